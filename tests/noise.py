"""Random images with and without masks, and a training step on them; seconds matter, accuracy does not."""

import os
import signal

import numpy as np
from PIL import Image

from evidence_ft.alignments import outside_mass
from evidence_ft.classifier import Classifier, FineTuning, linear_head, prompt_classifier
from evidence_ft.heatmaps import gradient_attention
from evidence_ft.objectives import contrastive, cross_entropy
from evidence_ft.samples import Sample
from evidence_ft.trainer import TrainerCallback
from evidence_ft.training import EvidenceTerm, TrainingStep
from evidence_ft.transforms import ModelInputs, SampleTransform, collate
from tests.conftest import build_encoder

NAMES = ("cat", "dog", "fox")
TEMPLATES = ("a photo of a {}",)


class Noise:
    """Random images of which every third has no mask. An `EvidenceDataset`."""

    class_names = NAMES

    def __init__(self, images=12):
        self.sample_ids = [f"noise-{row}" for row in range(images)]
        self.labels = [row % 3 for row in range(images)]
        self.mask_sources = ["none" if row % 3 == 2 else "mask" for row in range(images)]
        self.opened = []

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        self.opened.append(row)
        generator = np.random.default_rng(row)
        image = Image.fromarray(generator.integers(0, 256, (32, 48, 3), dtype=np.uint8))
        mask = None
        if self.mask_sources[row] != "none":
            mask = np.zeros((32, 48), np.uint8)
            mask[8:24, 8:32] = 1
        return Sample(self.sample_ids[row], image, self.labels[row], mask, self.mask_sources[row])


def contrastive_tuning(encoder):
    encoder.requires_grad_(True)
    objective = contrastive(encoder, NAMES, TEMPLATES, "class")
    return FineTuning(encoder, objective, lambda: prompt_classifier(encoder, NAMES, TEMPLATES))


def cross_entropy_tuning(encoder):
    encoder.requires_grad_(False)
    encoder.image_tower.requires_grad_(True)
    head = linear_head(encoder, NAMES, TEMPLATES, "zero_shot")
    return FineTuning(encoder, cross_entropy(head), lambda: Classifier(encoder.image_tower, head, NAMES), head=head)


def make_step(
    weight=1.0, heatmap=gradient_attention.heatmap, alignment=outside_mass.loss, layers="all", tune=contrastive_tuning
):
    return TrainingStep(tune(build_encoder("native")), EvidenceTerm(heatmap, alignment, layers, weight))


def make_inputs(encoder, augmentation=None, images=12):
    return ModelInputs(Noise(images), SampleTransform(encoder.preprocessing, augmentation), seed=0)


def make_batch(step, rows=range(6)):
    inputs = make_inputs(step.encoder)
    return collate([inputs[row] for row in rows])


def weights_of(step):
    return {name: parameter.detach().clone() for name, parameter in step.named_parameters()}


def in_double(inputs):
    """Images in double precision, so that what is compared is the algorithm and not the order of its sums."""

    class Double:
        def __getattr__(self, name):
            return getattr(inputs, name)

        def __len__(self):
            return len(inputs)

        def __getitem__(self, row):
            return inputs[row]._replace(images=inputs[row].images.double())

    return Double()


class Stop(TrainerCallback):
    """Sends this process a signal after a step, as a scheduler or Ctrl-C would."""

    def __init__(self, step, number=signal.SIGTERM):
        self.step = step
        self.number = number

    def on_step_end(self, step, record):
        if step == self.step:
            os.kill(os.getpid(), self.number)
