"""Generic Attention Attribution (Chefer et al. 2021, arXiv 2103.15679) for an image tower.

Per layer, ``Abar = mean over heads of relu(A * dS/dA)``; relevance starts as the identity and each layer adds
``R <- R + Abar R`` (eqs. 5 and 6). What is shown depends on how the tower reads its tokens:

* one token (CLS): its row, without the column of the prefix. This is the map of Wang et al. (AAAI 2025).
* the mean over the patches: the mean of their rows, without the identity that each token starts with, which is the same
  for every image and would drown the rest.
* a probe that pools by attention: its own ``Abar``, times ``R`` (the paper's eq. 10, for a query that carries nothing
  of the image itself).
* several rows side by side (DINOv2's classifier reads the CLS token and the mean): the mean of their maps.

Two things differ from the reference code, and neither changes a value: all gradients come from one call of autograd,
and only one row is propagated, from the top down, as a vector.
"""

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor

from evidence_ft.types import ScoreFn, VisionTrace, at_least_float32


def heatmap(trace: VisionTrace, score: ScoreFn, *, create_graph: bool) -> Tensor:
    """Relevance of each patch for ``score``, in float32 or better.

    Args:
        trace: of any tower.
        score: what is explained; images must not influence each other's score.
        create_graph: True to train through the heatmap, False to look at it.

    Returns:
        ``(B, h, w)``, non-negative; its scale means nothing.
    """
    probed = trace.pooling.requires_grad
    maps = (*trace.attention, trace.pooling) if probed else trace.attention
    with torch.enable_grad():  # the trace has a graph even where the caller wants none
        total = score(trace.features).sum()
    gradients = torch.autograd.grad(total, maps, create_graph=create_graph, retain_graph=True)
    with torch.set_grad_enabled(create_graph):
        pulls = [_pull(attention, gradient) for attention, gradient in zip(maps, gradients, strict=True)]
        start = rearrange(pulls.pop() if probed else reduce(trace.pooling, "b h 1 n -> b 1 n", "mean"), "b 1 n -> b n")
        relevance = start = at_least_float32(start)
        for pull in reversed(pulls):
            relevance = relevance + einsum(relevance, pull, "b q, b q n -> b n")
        return trace.on_grid(relevance if probed else relevance - start)


def _pull(attention: Tensor, gradient: Tensor) -> Tensor:
    """``(B, H, Q, N)`` each to ``(B, Q, N)``: what raises the score, averaged over the heads."""
    return reduce((at_least_float32(attention) * at_least_float32(gradient)).clamp(min=0), "b h q n -> b q n", "mean")
