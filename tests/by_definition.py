"""Slow, plain twins of what the library computes: each as its source defines it, too plain to be wrong."""

import math

import torch
from torch import Tensor


def rma(heatmap: Tensor, mask: Tensor) -> float:
    """Arras et al. 2022, pixel by pixel."""
    inside = total = 0.0
    for row, mask_row in zip(heatmap.tolist(), mask.tolist(), strict=True):
        for relevance, evidence in zip(row, mask_row, strict=True):
            inside += relevance * evidence
            total += relevance
    return inside / total


def generic_attention_attribution(
    attentions: list[Tensor],
    gradients: list[Tensor],
    *,
    shares: list[float] | None = None,
    probe: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Chefer et al. 2021, eqs. 5 and 6, one image: per layer ``(H, N, N)``. Relevance of each token ``(N,)``.

    Read from the tokens by their shares, each without the identity it starts with (by default the first alone), or
    by a probe's attention and its gradient ``(H, 1, N)`` (eq. 10, where the query starts with nothing of the image).
    """
    tokens = attentions[0].shape[-1]
    identity = torch.eye(tokens, dtype=torch.float64)
    relevance = identity
    for attention, gradient in zip(attentions, gradients, strict=True):
        relevance = relevance + _average_pull(attention, gradient) @ relevance
    if probe is not None:
        return (_average_pull(*probe) @ relevance)[0]
    read = torch.zeros(tokens, dtype=torch.float64)
    for share, row in zip(shares or [1.0] + [0.0] * (tokens - 1), relevance - identity, strict=True):
        read += share * row
    return read


def _average_pull(attention: Tensor, gradient: Tensor) -> Tensor:
    total = torch.zeros(attention.shape[1:], dtype=torch.float64)
    for of_head, gradient_of_head in zip(attention.double(), gradient.double(), strict=True):
        total += (of_head * gradient_of_head).clamp(min=0)
    return total / len(attention)


def contrastive(images: Tensor, texts: Tensor, scale: float, positives: Tensor) -> float:
    """Both directions of the contrastive loss, sum by sum."""
    images = images / images.norm(dim=1, keepdim=True)
    texts = texts / texts.norm(dim=1, keepdim=True)
    total = 0.0
    for rows, columns, fits in ((images, texts, positives), (texts, images, positives.T)):
        for i in range(len(rows)):
            logits = [scale * float(rows[i] @ columns[j]) for j in range(len(columns))]
            log_sum = torch.tensor(logits).logsumexp(0).item()
            chosen = [j for j in range(len(columns)) if fits[i, j]]
            total += -sum(logits[j] - log_sum for j in chosen) / len(chosen) / len(rows) / 2
    return total


def sigmoid(images: Tensor, texts: Tensor, scale: float, bias: float, positives: Tensor) -> float:
    """The sigmoid loss of Zhai et al. 2023 (arXiv 2303.15343, eq. 1), pair by pair."""
    images = images / images.norm(dim=1, keepdim=True)
    texts = texts / texts.norm(dim=1, keepdim=True)
    total = 0.0
    for i in range(len(images)):
        for j in range(len(texts)):
            z = 1 if positives[i, j] else -1
            total -= math.log(1 / (1 + math.exp(-z * (scale * float(images[i] @ texts[j]) + bias))))
    return total / len(images)
