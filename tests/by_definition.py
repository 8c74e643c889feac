"""Slow, plain twins of what the library computes: each as its source defines it, too plain to be wrong."""

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


def generic_attention_attribution(attentions: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """Chefer et al. 2021, eqs. 5 and 6, one image: per layer ``(H, N, N)``; the CLS row without the CLS column."""
    tokens = attentions[0].shape[-1]
    relevance = torch.eye(tokens, dtype=torch.float64)
    for attention, gradient in zip(attentions, gradients, strict=True):
        pull = torch.zeros(tokens, tokens, dtype=torch.float64)
        for head in range(len(attention)):
            pull += (attention[head] * gradient[head]).double().clamp(min=0) / len(attention)
        relevance = relevance + pull @ relevance
    return relevance[0, 1:]


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
