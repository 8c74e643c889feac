"""Reductions across processes, all of them. Every function is the identity, or plain torch, on one process."""

import torch
import torch.distributed as dist
from torch import Tensor


def num_processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(local: Tensor) -> Tensor:
    """All processes' rows in the order of the ranks, without gradient: ``(B, ...)`` to ``(W * B, ...)``."""
    if num_processes() == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(num_processes())]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts)


class _GatherWithGradient(torch.autograd.Function):
    """Backward sums what each process wants of these rows and keeps the own ones."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, local: Tensor) -> Tensor:
        ctx.rows = len(local)  # type: ignore[attr-defined]  # the documented way to keep what is no tensor
        return gather(local)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        rows: int = ctx.rows  # type: ignore[attr-defined]
        return total[dist.get_rank() * rows :][:rows]


def gather_with_grad(local: Tensor) -> Tensor:
    """All processes' rows in the order of the ranks: ``(B, F)`` to ``(W * B, F)``, differentiable.

    The gradient of a row is summed over processes. A loss computed identically on each process from the gathered
    rows therefore gives, after the averaging of data parallelism, the gradient of one process with the whole batch.
    Every process must hold the same number of rows.
    """
    if num_processes() == 1:
        return local
    gathered: Tensor = _GatherWithGradient.apply(local)
    return gathered


def mean_over_processes(local: Tensor) -> Tensor:
    """The mean of each entry over processes, without gradient; what data parallelism does to gradients."""
    if num_processes() == 1:
        return local
    total = local.clone()
    dist.all_reduce(total)
    return total / num_processes()


def mean_over_defined(per_image: Tensor) -> Tensor:
    """Mean of the entries that are not NaN, over all processes' images.

    Scaled so that averaging over processes, as data parallelism does with gradients, gives the mean over the images
    of all of them: a mean per process would weigh an image more where few are annotated.

    Args:
        per_image: ``(B,)``, NaN where undefined.

    Returns:
        ``()``; 0 where nothing is defined anywhere.

    Example:
        >>> mean_over_defined(torch.tensor([1.0, float("nan"), 3.0]))
        tensor(2.)
    """
    defined = ~per_image.isnan()
    count = defined.sum().float()
    if num_processes() > 1:
        dist.all_reduce(count)
    total = torch.where(defined, per_image, 0).sum()
    return total * num_processes() / count.clamp(min=1)
