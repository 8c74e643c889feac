"""Generic Attention Attribution (Chefer et al. 2021, arXiv 2103.15679), for a tower that reads its CLS token.

Per layer, ``Abar = mean over heads of relu(A * dS/dA)``; relevance starts as the identity and each layer adds
``R <- R + Abar R`` (eqs. 5 and 6); the map is the CLS row without the CLS column. This is the map of Wang et al. (AAAI
2025). Two things differ from the reference code, and neither changes a value: all layers' gradients come from
one call of autograd, and only the CLS row is propagated, from the top down, as a vector.
"""

import torch
from einops import einsum, reduce
from torch import Tensor

from evidence_ft.types import ScoreFn, VisionTrace, at_least_float32


def heatmap(trace: VisionTrace, score: ScoreFn, *, create_graph: bool) -> Tensor:
    """Relevance of each patch for ``score``, in float32 or better.

    Args:
        trace: of a tower that reads its first token.
        score: what is explained; images must not influence each other's score.
        create_graph: True to train through the heatmap, False to look at it.

    Returns:
        ``(B, h, w)``, non-negative; its scale means nothing.
    """
    if trace.num_prefix_tokens < 1:
        raise ValueError("gradient_attention reads the CLS row, and this image tower has no CLS token")
    with torch.enable_grad():  # the trace has a graph even where the caller wants none
        total = score(trace.features).sum()
    gradients = torch.autograd.grad(total, trace.attention, create_graph=create_graph, retain_graph=True)
    batch, _, tokens, _ = trace.attention[0].shape
    attention_like = at_least_float32(trace.attention[0])
    relevance = attention_like.new_zeros(batch, tokens)
    relevance[:, 0] = 1
    with torch.set_grad_enabled(create_graph):
        for attention, gradient in zip(reversed(trace.attention), reversed(gradients), strict=True):
            pull = reduce(
                (at_least_float32(attention) * at_least_float32(gradient)).clamp(min=0), "b h q n -> b q n", "mean"
            )
            relevance = relevance + einsum(relevance, pull, "b q, b q n -> b n")
        return trace.on_grid(relevance)
