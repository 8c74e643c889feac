"""LP-FT: fit a linear classifier on frozen features first, then fine-tune the image tower from there.

Kumar et al. 2022 (arXiv 2202.10054): a tower that is tuned under an untrained classifier distorts its features before
the classifier has found its place. The probe is a logistic regression on the features of the training images without
augmentation, fitted with L-BFGS in float64; it is done before the first step. Deviations: the features have unit
length, and the strength of the L2 penalty is given instead of swept.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from evidence_ft.adaptation import LoraConfig, Mode, Towers, adapt
from evidence_ft.classifier import Classifier, FineTuning, HeadInit, LinearHead, linear_head
from evidence_ft.encoder import Encoder
from evidence_ft.objectives import cross_entropy
from evidence_ft.prompts import Templates


class Config(BaseModel):
    """How the probe is fitted, and what is trained after it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["lp_ft"] = Field("lp_ft", description="linear probe, then fine-tune the image tower")
    templates: Templates = Field(
        ("a photo of a {}",), description="captions of a class, averaged, for the zero-shot start; or clip_7, clip_80"
    )
    head: HeadInit = Field("zero_shot", description="where the probe starts; fitted to the end it forgets it")
    l2: float = Field(1e-6, gt=0, description="of the probe: mean cross entropy + l2 / 2 * sum of squared weights")
    probe_iterations: int = Field(1000, gt=0, description="of L-BFGS, at most; few keep the probe near its start")
    vision: Mode = Field("full", description="what is trained of the image tower")
    lora: LoraConfig = Field(LoraConfig(), description="of an image tower in mode lora")


def prepare(encoder: Encoder, class_names: Sequence[str], config: Config) -> FineTuning:
    """Fit a linear classifier on the training set when it is read, then train it and the image tower."""
    head = linear_head(encoder, class_names, config.templates, config.head)
    adapt(encoder, Towers(config.vision, text="frozen", train_logit_scale=False, lora=config.lora))
    return FineTuning(
        encoder,
        cross_entropy(head),
        lambda: Classifier(encoder.image_tower, head, class_names),
        head=head,
        read_training_set=lambda features, labels: fit_probe(
            head, features, labels, l2=config.l2, iterations=config.probe_iterations
        ),
    )


def fit_probe(head: LinearHead, features: Tensor, labels: Tensor, *, l2: float, iterations: int) -> None:
    """Logistic regression from where the head is, in place; the bias is not penalised.

    Args:
        head: comes out fitted.
        features: ``(n, F)``.
        labels: ``(n,)``.
        l2: of the penalty ``l2 / 2 * sum of squared weights`` beside the mean cross entropy.
        iterations: of L-BFGS, at most.
    """
    device = head.weight.device
    inputs, targets = head.inputs(features.detach().to(device).double()), labels.to(device)
    weight, bias = (parameter.detach().double().requires_grad_() for parameter in (head.weight, head.bias))
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(inputs, weight, bias), targets) + l2 / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
