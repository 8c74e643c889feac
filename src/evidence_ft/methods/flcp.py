"""FLCP: fine-tune like CLIP pre-training, images against the captions of their classes.

Goyal et al. 2023 (FLYP, arXiv 2212.00638), as compared by Wang et al. (AAAI 2025, arXiv 2412.13333). Both towers and
the logit scale are trained as by Goyal et al.; the code of Wang et al. keeps CLIP's temperature fixed. Features are
gathered over processes, so the contrastive batch is the global one. With several templates each image draws one of
them at each step.

Same-class images of a batch share their caption. With one caption per class the published pair targets (each caption
belongs to one image) and class targets (to all images of its class) are the same loss; with several they differ. So
they do under the sigmoid loss of SigLIP (Zhai et al. 2023, arXiv 2303.15343), which takes the place of the softmax for
models that were trained with it.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from evidence_ft.adaptation import LoraConfig, Mode, Towers, adapt
from evidence_ft.classifier import FineTuning, prompt_classifier
from evidence_ft.encoder import Encoder, with_text
from evidence_ft.objectives import ContrastiveLoss, contrastive
from evidence_ft.prompts import Templates


class Config(BaseModel):
    """What captions say, what counts as a match, and what is trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["flcp"] = Field("flcp", description="fine-tune like CLIP pre-training")
    templates: Templates = Field(
        ("a photo of a {}",), description="captions of a class: drawn in training, averaged in use; or clip_7, clip_80"
    )
    targets: Literal["pair", "class"] = Field(
        "class", description="a caption fits its own image alone (published), or all images of its class"
    )
    loss: ContrastiveLoss = Field(
        "auto", description="softmax over the batch (CLIP), sigmoid of each pair (SigLIP), or as the model was trained"
    )
    vision: Mode = Field("full", description="what is trained of the image tower")
    text: Mode = Field("full", description="what is trained of the text tower")
    train_logit_scale: bool = Field(True, description="learn the temperature, as FLYP does")
    lora: LoraConfig = Field(LoraConfig(), description="of towers in mode lora")


def prepare(encoder: Encoder, class_names: Sequence[str], config: Config) -> FineTuning:
    """Train on image-caption pairs; the classifier re-reads the prompts at each evaluation.

    Raises:
        ValueError: the encoder has no text tower.
    """
    dual = with_text(encoder, "method flcp")
    adapt(dual, Towers(config.vision, config.text, config.train_logit_scale, config.lora))
    return FineTuning(
        dual,
        contrastive(dual, class_names, config.templates, config.targets, config.loss),
        lambda: prompt_classifier(dual, class_names, config.templates),
    )
