"""The gradient norm of the whole model in every layout, without gathering gradients.

Squares of local shards are summed per set of axes over which the gradients are sharded, then over the ranks
of those axes, and finally over pipeline stages. Replicated gradients and tied weights count once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hybridtrain.parallel.mesh import Mesh, sharded_over
from hybridtrain.plan.layout import AXES


@torch.no_grad()
def gradient_norm(parameters: Sequence[nn.Parameter], *, mesh: Mesh) -> Tensor:
    """L2 norm over all parameters of all stages, 0-d fp32, the same on every rank; does not wait
    for the device (collective).

    Non-finite if any gradient is.
    """
    groups: dict[frozenset[str], list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            axes, local = _sharded_over(parameter.grad)
            groups.setdefault(axes, []).append(local)
    zero = torch.zeros((), dtype=torch.float32, device=mesh.device)
    sums = {axes: _sum_of_squares(locals_, zero=zero) for axes, locals_ in groups.items()}
    for axis in AXES:
        if sharded := [axes for axes in sums if axis in axes]:
            total = torch.stack([sums[axes] for axes in sharded])
            mesh.sum(total, over=axis)
            sums.update(zip(sharded, total.unbind(), strict=True))
    norm = torch.stack([zero, *sums.values()]).sum()
    mesh.sum(norm, over="pp")
    return norm.sqrt()


def _sum_of_squares(locals_: Sequence[Tensor], *, zero: Tensor) -> Tensor:
    tensors = [local for local in locals_ if local.numel()]
    # On the CPU, torch uses a single running sum, whose fp32 error is 1e-5 for 2^20 elements, 8e-4 for 2^24.
    dtype = torch.float64 if zero.device.type == "cpu" else torch.float32
    return torch.stack(torch._foreach_norm(tensors, dtype=dtype)).square().sum().float() if tensors else zero


def _sharded_over(grad: Tensor) -> tuple[frozenset[str], Tensor]:
    """(axes over which the gradient is sharded, its local part)."""
    if isinstance(grad, DTensor):
        assert not any(placement.is_partial() for placement in grad.placements)
    return frozenset(sharded_over(grad)), local_part(grad)


def add_tied_gradients(
    embed: nn.Parameter | None, head: nn.Parameter | None, *, group: dist.ProcessGroup | None
) -> None:
    """Replace the gradients of both copies of a tied matrix by their sum.

    A copy on the other rank of `group` is None here.
    """
    if embed is not None and head is not None:
        total = local_part(embed.grad) + local_part(head.grad)
        for copy in (embed, head):
            local_part(copy.grad).copy_(total)
    elif embed is not None or head is not None:
        dist.all_reduce(local_part((embed if embed is not None else head).grad), group=group)  # type: ignore[union-attr]


def local_part(tensor: Tensor | None) -> Tensor:
    """This rank's part of a tensor, in the same memory."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
