"""A data set without files, for tests that need some images with evidence."""

import numpy as np
from PIL import Image

from evidence_ft.samples import Sample


class InMemory:
    """Images with the left half annotated; a data set by shape, not by inheritance."""

    def __init__(self, n=4, size=(8, 6)):
        self.class_names = ("cat", "dog")
        self.sample_ids = [f"image {row}" for row in range(n)]
        self.labels = [row % 2 for row in range(n)]
        self.mask_sources = ["mask"] * n
        self.size = size

    def __len__(self):
        return len(self.sample_ids)

    def __getitem__(self, row):
        width, height = self.size
        noise = np.random.default_rng(row).integers(0, 256, (height, width, 3), dtype=np.uint8)
        mask = np.zeros((height, width), dtype=np.uint8)
        mask[:, : width // 2] = 1
        return Sample(self.sample_ids[row], Image.fromarray(noise), self.labels[row], mask, self.mask_sources[row])
