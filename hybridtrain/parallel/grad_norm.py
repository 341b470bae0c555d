"""The gradient norm of the whole model in every layout, without gathering gradients.

Squares of local shards are summed per set of axes over which the gradients are sharded, then over the ranks
of those axes, and finally over pipeline stages. Replicated gradients count once;
so do parameters that several stages hold (shared.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hybridtrain.parallel.mesh import Mesh, sharded_over
from hybridtrain.plan.layout import AXES


@torch.no_grad()
def gradient_norm(parameters: Sequence[nn.Parameter], *, mesh: Mesh, dtype: torch.dtype) -> Tensor:
    """L2 norm over all parameters of all stages, 0-d in `dtype`, the same on every rank; does not wait
    for the device (collective).

    Non-finite if any gradient is.
    """
    groups: dict[frozenset[str], list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            axes, local = _sharded_over(parameter.grad)
            groups.setdefault(axes, []).append(local)
    zero = torch.zeros((), dtype=dtype, device=mesh.device)
    sums = {axes: _sum_of_squares(locals_, zero=zero) for axes, locals_ in groups.items()}
    for axis in AXES:
        if sharded := [axes for axes in sums if axis in axes]:
            total = torch.stack([sums[axes] for axes in sharded])
            mesh.sum(total, over=axis)
            sums.update(zip(sharded, total.unbind(), strict=True))
    norm = torch.stack([zero, *sums.values()]).sum()
    mesh.sum(norm, over="pp")
    return norm.sqrt()


def agreed(values: Tensor, *, mesh: Mesh) -> Tensor:
    """`values`, not finite where they are not on any tensor-parallel rank (collective).

    These ranks compute the same, so that only a fault of the hardware tells them apart. Then they would
    decide differently about the step, and wait for each other.
    """
    if mesh.layout.tp == 1:
        return values
    finite = values.isfinite()
    elsewhere = torch.where(finite, torch.zeros_like(values), torch.nan)
    mesh.sum(elsewhere, over="tp")
    return torch.where(finite, values + elsewhere, values)


def _sum_of_squares(locals_: Sequence[Tensor], *, zero: Tensor) -> Tensor:
    tensors = [local for local in locals_ if local.numel()]
    if not tensors:
        return zero
    # On the CPU, torch uses a single running sum, whose fp32 error is 1e-5 for 2^20 elements, 8e-4 for 2^24.
    dtype = torch.float64 if tensors[0].device.type == "cpu" else zero.dtype
    # offloaded gradients are on the CPU, `zero` is on the device
    return torch.stack(torch._foreach_norm(tensors, dtype=dtype)).square().sum().to(zero)


def _sharded_over(grad: Tensor) -> tuple[frozenset[str], Tensor]:
    """(axes over which the gradient is sharded, its local part)."""
    if isinstance(grad, DTensor):
        assert not any(placement.is_partial() for placement in grad.placements)
    return frozenset(sharded_over(grad)), local_part(grad)


def local_part(tensor: Tensor | None) -> Tensor:
    """This rank's part of a tensor, in the same memory."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
