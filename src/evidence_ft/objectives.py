"""What training minimises: features and labels to a loss, and to the score that is explained.

The score is a differentiable function of features and of what is trained. A heatmap takes its gradient with respect to
the features, so a loss on the heatmap reaches everything that gradient depends on, a head on frozen towers included.
"""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from evidence_ft.classifier import Objective, own_score
from evidence_ft.contrastive import contrastive_loss, sigmoid_loss
from evidence_ft.distributed import gather, gather_with_grad
from evidence_ft.encoder import DualEncoder
from evidence_ft.prompts import fill
from evidence_ft.types import ScoreFn, at_least_float32

ContrastiveLoss: TypeAlias = Literal["auto", "softmax", "sigmoid"]
"""CLIP's softmax over the batch, SigLIP's sigmoid of each pair, or the one the encoder was trained with."""


def cross_entropy(head: Callable[[Tensor], Tensor]) -> Objective:
    """Cross entropy over a head's logits; the score is the logit of the label.

    Args:
        head: features ``(B, F)`` to logits ``(B, K)``.
    """

    def objective(features: Tensor, labels: Tensor) -> tuple[Tensor, ScoreFn]:
        return F.cross_entropy(head(features), labels), own_score(head, labels)

    return objective


def contrastive(
    encoder: DualEncoder,
    class_names: Sequence[str],
    templates: Sequence[str],
    targets: Literal["pair", "class"],
    loss: ContrastiveLoss = "auto",
) -> Objective:
    """Images against the captions of their classes, gathered over processes; the score is the own caption's logit.

    Of several templates each image draws one, from torch's own generator on the CPU. Each caption that occurs in the
    batch is encoded once, however many of its images there are.

    Args:
        encoder: read at each call; its logit scale and bias are used as they are. A bias that the softmax cannot see
            is frozen.
        class_names: in the order of the labels.
        templates: captions of a class.
        targets: a caption fits its own image alone, or all images of its class. The same softmax loss where a class has
            one caption: images with equal captions have equal logits, so a uniform target over them and the sum of
            one-hot targets agree. The sigmoid loss tells them apart: of pairs, equal captions of other images are
            negatives.
        loss: by default the sigmoid loss where the encoder has a logit bias.

    Raises:
        ValueError: the sigmoid loss for an encoder without a logit bias.
    """
    if loss == "sigmoid" and encoder.logit_bias is None:
        raise ValueError(
            f"loss 'sigmoid' needs a logit bias, which {encoder.checkpoint!r} does not have; choose 'softmax', or a "
            "model that was trained with the sigmoid loss (SigLIP)"
        )
    if loss == "softmax" and encoder.logit_bias is not None:
        encoder.logit_bias.requires_grad_(False)
    captions = fill(templates, class_names)

    def objective(features: Tensor, labels: Tensor) -> tuple[Tensor, ScoreFn]:
        drawn = labels
        if len(templates) > 1:
            template = torch.randint(len(templates), labels.shape).to(labels.device)
            drawn = template * len(class_names) + labels
        present, caption_of = torch.unique(drawn, return_inverse=True)
        text_features = encoder.encode_text([captions[caption] for caption in present.tolist()])[caption_of]
        scale = encoder.logit_scale.exp()
        positives = None
        if targets == "class":
            everyone = gather(labels)
            positives = everyone[:, None] == everyone[None, :]
        # At a scale of 100, logits in bfloat16 are multiples of 0.5.
        with torch.autocast(features.device.type, enabled=False):
            images, texts = gather_with_grad(features), gather_with_grad(text_features)
            if loss == "softmax" or encoder.logit_bias is None:
                value = contrastive_loss(images, texts, scale, positives)
            else:
                value = sigmoid_loss(images, texts, scale, encoder.logit_bias, positives)
            own_caption = F.normalize(at_least_float32(text_features), dim=-1)

        def score(features: Tensor) -> Tensor:
            return scale * (F.normalize(at_least_float32(features), dim=-1) * own_caption).sum(dim=-1)

        return value, score

    return objective
