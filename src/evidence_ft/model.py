"""A tuned classifier in use: what it predicts, and where it looked. `saved_model` is its folder."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, NamedTuple, Self, TypeAlias

import huggingface_hub
import numpy as np
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from PIL import Image
from pydantic import BaseModel
from torch import Tensor

from evidence_ft.classifier import FineTuning, Heatmap
from evidence_ft.config import component
from evidence_ft.encoder import CheckpointError
from evidence_ft.evidence import checked_heatmaps
from evidence_ft.files import named, write_atomically
from evidence_ft.images import DataError, read_image
from evidence_ft.model_card import model_card
from evidence_ft.samples import Sample
from evidence_ft.saved_model import BaseModelRef, Manifest, Prepare, load_tuning, put_back, save_model, whole_folder
from evidence_ft.tower import Layers
from evidence_ft.transforms import SampleTransform
from evidence_ft.types import Preprocessing
from evidence_ft.wrapped_datasets import read_image_value

ImageInput: TypeAlias = Image.Image | Path | str
"""An image, or the path of one."""

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def _local_folder(path_or_hub_id: str | Path, revision: str | None, token: str | None) -> Path:
    """The folder itself, or the one that the hub's client has put the files into."""
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    name = str(path_or_hub_id).removeprefix("hf-hub:")
    if isinstance(path_or_hub_id, Path) or not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"no folder {path_or_hub_id}; expected one written by save_model, or a hub's <owner>/<name>"
        )
    try:
        # What is not needed is not fetched, pickles least of all.
        found = huggingface_hub.snapshot_download(
            name, revision=revision, token=token, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]
        )
    except (OSError, HFValidationError, HfHubHTTPError) as error:
        raise CheckpointError(
            f"{name!r} is no folder here, and could not be had from the hub: {type(error).__name__}: {error}. Without "
            "network, download it elsewhere and give its folder"
        ) from error
    return Path(found)


@contextmanager
def _of_the_hub(repo_id: str) -> Iterator[None]:
    """What goes wrong in an upload, as one error."""
    try:
        yield
    except Exception as error:  # whatever the hub's client or its network library came up with
        raise CheckpointError(
            f"the model could not be uploaded to {repo_id!r}: {type(error).__name__}: {error}. Log in with `hf auth "
            "login`, or give token=; without network, write it with save_pretrained and upload that folder later, with "
            "`hf upload`"
        ) from error


class Predictions(NamedTuple):
    """What a classifier says of ``n`` images.

    Attributes:
        labels: ``(n,)`` int64, rows of the model's ``class_names``.
        names: of these classes.
        probabilities: ``(n, K)`` float32.
    """

    labels: Tensor
    names: list[str]
    probabilities: Tensor


class EvidenceModel:
    """A classifier that says which class an image is of, and where it looked.

    Args:
        tuning: as it is now; is put into evaluation mode.
        method_config: settings of the method that prepared it.
        base: the model that was tuned.
        heatmap: name of the file in ``heatmaps`` that explains predictions.
        layers: blocks it is made from.

    Example:
        >>> model = EvidenceModel.from_pretrained("runs/mine/evidence/model")  # doctest: +SKIP
        >>> model.predict("cat.jpg").names  # doctest: +SKIP
        ['cat']
        >>> model.explain(["cat.jpg", "dog.jpg"]).shape  # doctest: +SKIP
        torch.Size([2, 14, 14])
    """

    def __init__(
        self,
        tuning: FineTuning,
        *,
        method_config: BaseModel | Mapping[str, Any],
        base: BaseModelRef,
        heatmap: str = "gradient_attention",
        layers: Layers = "all",
    ) -> None:
        tuning.encoder.eval()
        tuning.head.eval()
        self.tuning = tuning
        self.method_config = method_config
        self.base = base
        self.heatmap = heatmap
        self.layers = layers
        self.classifier = tuning.classifier()
        self.classifier.head.eval()

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        device: str | torch.device = "cpu",
        base: str | None = None,
        method: ModuleType | Prepare | None = None,
        backbone: ModuleType | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> Self:
        """Load a saved model.

        Args:
            path_or_hub_id: a folder written by `save_model`, or ``<owner>/<name>`` on the Hugging Face hub.
            device: to compute on.
            base: where the base model is now, if its recorded name does not lead there.
            method: module or function of a method of your own, see `load_tuning`.
            backbone: module of a backbone of your own.
            revision: branch, tag or commit on the hub.
            token: for the hub; by default the one the hub's client knows.

        Raises:
            CheckpointError: nothing there, or it is damaged, of another version, or tuned from another base model.
        """
        directory = _local_folder(path_or_hub_id, revision, token)
        tuning, manifest = load_tuning(directory, base=base, method=method, backbone=backbone)
        tuning.encoder.to(device)
        tuning.head.to(device)
        return cls(
            tuning,
            method_config=manifest.method,
            base=BaseModelRef(manifest.backbone, **manifest.base.model_dump()),
            heatmap=manifest.heatmap,
            layers=manifest.layers,
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the labels."""
        return tuple(self.classifier.class_names)

    @property
    def preprocessing(self) -> Preprocessing:
        """What the image tower expects; `predict` and `explain` see to it."""
        return self.tuning.encoder.preprocessing

    @torch.no_grad()
    def predict(self, images: ImageInput | Sequence[ImageInput], *, batch_size: int = 32) -> Predictions:
        """Classify images.

        Args:
            images: one or many, PIL images or paths.
            batch_size: images at a time.
        """
        logits = [
            self.classifier.head(self.classifier.tower(pixels)) for pixels in self._batches(_listed(images), batch_size)
        ]
        probabilities = torch.cat(logits).float().softmax(dim=-1).cpu()
        labels = probabilities.argmax(dim=-1)
        return Predictions(labels, [self.class_names[label] for label in labels], probabilities)

    @torch.no_grad()
    def explain(
        self,
        images: ImageInput | Sequence[ImageInput],
        labels: int | str | Sequence[int | str] | Tensor | None = None,
        *,
        layers: Layers | None = None,
        heatmap: Heatmap | None = None,
        batch_size: int = 16,
    ) -> Tensor:
        """Heatmaps of what speaks for a class.

        Args:
            images: one or many, PIL images or paths.
            labels: the class to explain for each image, as number or name, such as `Predictions.labels`; None for the
                predicted ones.
            layers: blocks the map is made from; by default those the model was explained by when it was tuned.
            heatmap: another map than the one the model was explained by.
            batch_size: images at a time.

        Returns:
            ``(n, h, w)`` float32 on the token grid, non-negative, any scale.

        Raises:
            ValueError: a class that the model does not know, not one for each image, or no heatmap from ``heatmap``.
        """
        images = _listed(images)
        chosen = None if labels is None else self._rows_of(labels, len(images))
        heatmap = heatmap or self._own_heatmap()
        maps = []
        for number, pixels in enumerate(self._batches(images, batch_size)):
            trace = self.classifier.tower.trace(pixels, self.layers if layers is None else layers)
            if chosen is None:
                explained = self.classifier.head(trace.features).argmax(dim=-1)
            else:
                explained = chosen[number * batch_size :][: len(pixels)].to(pixels.device)
            found = heatmap(trace, self.classifier.score_of(explained), create_graph=False)
            maps.append(checked_heatmaps(found, len(pixels), trace.grid).float().cpu())
        return torch.cat(maps)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the folder that `from_pretrained` reads; see `save_model`."""
        save_model(
            Path(directory),
            self.tuning,
            class_names=self.class_names,
            method_config=self.method_config,
            base=self.base,
            heatmap=self.heatmap,
            layers=self.layers,
        )

    def export(self, directory: str | Path) -> None:
        """Write the encoder alone in its backbone's own layout, LoRA merged in: without head and class names.

        Raises:
            FileExistsError: the folder is not empty. An export replaces nothing, not even an earlier one: it has no
                record of which files are its own.
        """
        directory = Path(directory).expanduser().resolve()
        put_back(directory)
        if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
            raise FileExistsError(
                f"{directory} is not empty, and an export replaces nothing; choose another folder, or remove this one"
            )
        with whole_folder(directory) as folder:
            self.tuning.encoder.save(folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a model tuned with evidence_ft",
        metrics: Mapping[str, Mapping[str, float]] | None = None,
        details: Mapping[str, object] | None = None,
    ) -> str:
        """Upload the saved folder with a model card to the Hugging Face hub.

        It takes the place of what is there: in an existing repository, files ending in .safetensors, .json, .txt and
        .model that are not of this model are deleted by the same commit, since they would be loaded with it.

        Args:
            repo_id: ``<owner>/<name>``; made if it does not exist.
            private: whether others may not see it; None for the owner's default.
            token: by default the one the hub's client knows.
            revision: branch to commit to.
            commit_message: of the commit.
            metrics: for the card, by row and column: ``{"baseline on test": {"accuracy": 0.9, "PT": 0.4}}``.
            details: for the card, what else there is to know of the training.

        Returns:
            Address of the commit.

        Raises:
            CheckpointError: the hub could not be reached, or refused.
        """
        hub = huggingface_hub.HfApi(token=token)
        with TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            self.save_pretrained(folder)
            with _of_the_hub(repo_id):
                repository = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
            card = model_card(
                title=repository.partition("/")[2],
                repo_id=repository,
                manifest=Manifest.read(folder).model_dump(),
                metrics=metrics or {},
                details=details or {},
            )
            write_atomically(folder / "README.md", card)
            with _of_the_hub(repo_id):
                commit = hub.upload_folder(
                    repo_id=repository,
                    folder_path=folder,
                    revision=revision,
                    commit_message=commit_message,
                    delete_patterns=["*.safetensors", "*.json", "*.txt", "*.model"],
                )
        return str(commit.commit_url)

    def _batches(self, images: Sequence[ImageInput], batch_size: int) -> Iterator[Tensor]:
        if not images:
            raise ValueError("found no images; give at least one")
        transform = SampleTransform(self.preprocessing)
        device = next(self.tuning.encoder.parameters()).device
        for start in range(0, len(images), batch_size):
            samples = [_as_sample(image, start + row) for row, image in enumerate(images[start : start + batch_size])]
            yield torch.stack([transform(sample)[0] for sample in samples]).to(device)

    def _rows_of(self, labels: int | str | Sequence[int | str] | Tensor, images: int) -> Tensor:
        values: Any = labels.tolist() if isinstance(labels, Tensor | np.ndarray | np.generic) else labels
        if not isinstance(values, Sequence) or isinstance(values, str):
            values = [values]
        if len(values) != images:
            raise ValueError(f"found {len(values)} labels for {images} images; give one for each")
        values = [value.item() if isinstance(value, Tensor | np.generic) else value for value in values]
        rows = [self.class_names.index(value) if value in self.class_names else value for value in values]
        for row in rows:
            if not isinstance(row, int) or not 0 <= row < len(self.class_names):
                raise ValueError(f"no class {row!r}; the model knows {named(self.class_names, 10)}, numbered from 0")
        return torch.tensor(rows)

    def _own_heatmap(self) -> Heatmap:
        if "." in self.heatmap:
            raise ValueError(
                f"the model was explained by {self.heatmap}, which is not part of evidence_ft; hand it over with "
                "heatmap="
            )
        function: Heatmap = component("heatmaps", self.heatmap).heatmap
        return function


def _listed(images: ImageInput | Sequence[ImageInput]) -> list[ImageInput]:
    return [images] if isinstance(images, Image.Image | Path | str) else list(images)


def _as_sample(image: ImageInput, number: int) -> Sample:
    if isinstance(image, str | Path):
        name, pixels = str(image), read_image(Path(image))
    elif isinstance(image, Image.Image):
        name = f"image {number}"
        pixels = read_image_value(image, name)
    else:
        raise DataError(f"image {number}: found {type(image).__name__}, expected a PIL image or a path")
    return Sample(name, pixels, 0, None, "none")
