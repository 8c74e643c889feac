"""What crosses processes: reductions, and parameters in shards. On one process every function is plain torch.

A heatmap's gradient is taken inside the forward pass. Data parallelism (DDP) need not know of it, sharding must:
fully sharded parameters (FSDP2) are gathered and dropped again around each block's forward and backward, and a gradient
inside the forward pass looks to FSDP2 like the end of the training step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


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


def shard(module: nn.Module) -> None:
    """Shard parameters, gradients and the optimizer's state over all processes, in place (FSDP2).

    To be called before the optimizer is built. Repeated blocks (the transformer blocks of both towers) are gathered one
    by one, for as long as they compute; what remains is gathered for the whole step. All processes start from the
    weights of the first one. Single numbers, which FSDP2 cannot shard, stay whole on every process, and their gradients
    are averaged as those of the others are.

    Args:
        module: the training step, on its device.

    Raises:
        ValueError: part of it has been sharded before, for an earlier training.
    """
    if any(isinstance(part, FSDPModule) for part in module.modules()):
        raise ValueError("part of this model was sharded for an earlier training; load the model anew to train again")
    for tensor in (*module.parameters(), *module.buffers()):
        dist.broadcast(tensor.detach(), src=0)
    scalars = {parameter for parameter in module.parameters() if parameter.numel() == 1}
    mesh = init_device_mesh(next(module.parameters()).device.type, (num_processes(),))
    for part in (*_repeated_blocks(module), module):
        fully_shard(part, mesh=mesh, ignored_params=scalars)
    for scalar in scalars:
        if scalar.requires_grad:
            scalar.register_post_accumulate_grad_hook(_average_gradient)  # type: ignore[no-untyped-call]
    # Otherwise a part of it, such as the image tower for a watched panel, could not run before all of it has run once.
    cast(Any, module)._get_fsdp_state()._lazy_init()


def _repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """Members of lists of modules of one kind, outer lists alone: a block may hold such a list itself."""
    blocks: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for container in module.modules():
        if container not in inside and isinstance(container, nn.ModuleList | nn.Sequential):
            members = list(container)
            kinds = {type(member) for member in members}
            if len(members) > 1 and len(kinds) == 1 and list(members[0].parameters()):
                blocks.extend(members)
                inside.update(part for member in members for part in member.modules())
    return blocks


def _average_gradient(parameter: Tensor) -> None:
    # Also right where gradients accumulate: what was accumulated before is the same everywhere, so averaging keeps it.
    assert parameter.grad is not None
    parameter.grad.copy_(mean_over_processes(parameter.grad))


@contextmanager
def inner_gradient(module: nn.Module) -> Iterator[None]:
    """Open around a gradient that is taken inside the forward pass of ``module``.

    While open, a sharded module neither drops the parameters it gathered for this gradient, whose graph the backward
    pass goes through once more, nor reduces anything over processes. Where nothing is sharded it does nothing.
    """
    groups = _groups(module)
    before = [(group.reduce_grads, group.all_reduce_grads, group.reshard_after_backward) for group in groups]
    for group in groups:
        group.reduce_grads = group.all_reduce_grads = group.reshard_after_backward = False
    try:
        yield
    finally:
        for group, settings in zip(groups, before, strict=True):
            group.reduce_grads, group.all_reduce_grads, group.reshard_after_backward = settings


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Open around what uses a sharded module outside its training step: measuring gradients, evaluating, saving.

    While open, every process holds every parameter whole, as `unshard` leaves it. Changes to parameters are lost.
    """
    if any("_to_sharded" in vars(group) for group in _groups(module)):  # whole already, and whose it is to shard again
        yield
        return
    unshard(module)
    try:
        yield
    finally:
        for group in _groups(module):
            del group._to_sharded
            group.reshard()


def unshard(module: nn.Module) -> None:
    """Make every parameter whole again on every process, in place, when training has ended.

    To be called by all processes at once. From then on nothing in the module communicates, so processes may do
    different things with it, and ``state_dict`` holds ordinary tensors.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.unshard()
    for group in _groups(module):
        # FSDP2 drops gathered parameters through this one method: after forward, after backward, before a state_dict.
        group._to_sharded = lambda: None


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor as one, without gradient, for all processes at once to call; any other tensor as it is."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor


def laid_out_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, the same on every process, in shards where ``other`` is in shards: the inverse of `whole`."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor.detach().to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def _groups(module: nn.Module) -> list[Any]:
    """The parameter groups of FSDP2, whose settings have public setters and no getters."""
    states = [part._get_fsdp_state() for part in module.modules() if isinstance(part, FSDPModule)]
    return [state._fsdp_param_group for state in states if state._fsdp_param_group is not None]
