"""LoRA: low-rank adapters in the towers, on the objective of FLCP or of full fine-tuning.

Hu et al. 2021 (arXiv 2106.09685). Before the first step the adapters add nothing. Objective ``flcp`` is Goyal et al.
2023 (arXiv 2212.00638) with both towers adapted; objective ``ft`` is cross entropy over a linear classifier that is
trained beside the adapters of the image tower. Evidence works as it does without LoRA: the adapted projections are
those that attention is made of.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from evidence_ft.adaptation import LoraConfig, Mode, Towers, adapt
from evidence_ft.classifier import Classifier, FineTuning, HeadInit, linear_head, prompt_classifier
from evidence_ft.encoder import Encoder, with_text
from evidence_ft.objectives import ContrastiveLoss, contrastive, cross_entropy
from evidence_ft.prompts import Templates


class Config(BaseModel):
    """Where adapters go, and what they are trained towards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["lora"] = Field("lora", description="low-rank adapters in the towers")
    objective: Literal["flcp", "ft"] = Field("flcp", description="image-caption pairs, or a linear classifier")
    templates: Templates = Field(
        ("a photo of a {}",), description="captions of a class: drawn in training, averaged in use; or clip_7, clip_80"
    )
    targets: Literal["pair", "class"] = Field(
        "class", description="of objective flcp: a caption fits its own image alone, or all images of its class"
    )
    loss: ContrastiveLoss = Field(
        "auto",
        description="of objective flcp: softmax over the batch, sigmoid of each pair, or as the model was trained",
    )
    head: HeadInit = Field("zero_shot", description="of objective ft: where the linear classifier starts")
    vision: Mode = Field("lora", description="what is trained of the image tower")
    text: Mode | None = Field(
        None, description="what is trained of the text tower; by default lora, frozen for objective ft"
    )
    train_logit_scale: bool | None = Field(
        None, description="learn the temperature; by default yes, no for objective ft"
    )
    lora: LoraConfig = Field(LoraConfig(), description="of towers in mode lora")

    @model_validator(mode="after")
    def _ft_leaves_texts_alone(self) -> "Config":
        if self.objective == "ft" and (self.text not in (None, "frozen") or self.train_logit_scale):
            raise ValueError(
                "objective 'ft' reads neither the text tower nor the logit scale once its classifier has started; "
                "leave text and train_logit_scale out, or choose objective 'flcp'"
            )
        return self

    @model_validator(mode="after")
    def _something_is_adapted(self) -> "Config":
        text = self.text or ("frozen" if self.objective == "ft" else "lora")
        if "lora" not in (self.vision, text):
            raise ValueError(
                f"no tower has an adapter: vision is {self.vision!r} and text is {text!r}; set one of them to 'lora' "
                "or choose method flcp, ft or lp"
            )
        return self


def prepare(encoder: Encoder, class_names: Sequence[str], config: Config) -> FineTuning:
    """Put adapters into the towers and train them on the chosen objective.

    Raises:
        ValueError: objective ``flcp`` without a text tower, or layers or a start that the encoder does not have.
    """
    if config.objective == "flcp":
        dual = with_text(encoder, "method lora with objective 'flcp'")
        learn_scale = config.train_logit_scale is not False
        adapt(dual, Towers(config.vision, config.text or "lora", learn_scale, config.lora))
        return FineTuning(
            dual,
            contrastive(dual, class_names, config.templates, config.targets, config.loss),
            lambda: prompt_classifier(dual, class_names, config.templates),
        )
    head = linear_head(encoder, class_names, config.templates, config.head)
    adapt(encoder, Towers(config.vision, text="frozen", train_logit_scale=False, lora=config.lora))
    return FineTuning(
        encoder, cross_entropy(head), lambda: Classifier(encoder.image_tower, head, class_names), head=head
    )
