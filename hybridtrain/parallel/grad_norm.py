"""The norm of the whole model's gradient, whatever the layout, without gathering a gradient.

Squares of local shards are added per set of axes over which a gradient is sharded, then summed over those axes, and at
last over pipeline stages. Replicated gradients count once, tied weights once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hybridtrain.parallel.mesh import Mesh, sharded_over

_SHARDING_AXES = ("dp_shard", "tp")
_PART = 1 << 14


@torch.no_grad()
def gradient_norm(parameters: Sequence[nn.Parameter], *, mesh: Mesh) -> Tensor:
    """L2 norm over all parameters of all stages, 0-d fp32, the same on every rank. Non-finite if any gradient is. The host does not wait."""
    sums = torch.zeros((2,) * len(_SHARDING_AXES), dtype=torch.float32, device=mesh.device)
    groups: dict[tuple[int, ...], list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            key, local = _sharded_over(parameter.grad)
            groups.setdefault(key, []).append(local)
    for key, locals_ in groups.items():
        parts = [part for local in locals_ for part in _parts(local)]
        if parts:
            sums[key].copy_(torch.stack(torch._foreach_norm(parts, dtype=torch.float32)).square().sum())
    for dim, axis in enumerate(_SHARDING_AXES):
        if getattr(mesh.layout, axis) > 1:
            sharded = sums.select(dim, 1)  # a view: an index made of numbers would be copied to the device, which waits for it
            total = sharded.contiguous()
            dist.all_reduce(total, group=mesh.group(axis))
            sharded.copy_(total)
    norm = sums.sum()
    if mesh.layout.pp > 1:
        dist.all_reduce(norm, group=mesh.group("pp"))
    return norm.sqrt()


def _parts(local: Tensor) -> Sequence[Tensor]:
    """Pieces whose norm is exact to fp32. On the CPU torch adds up in one running sum: 1e-5 off at 2^20 elements, 8e-4 at 2^24."""
    if not local.numel():
        return []
    return local.flatten().split(_PART) if local.device.type == "cpu" else [local]


def _sharded_over(grad: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """For each axis of _SHARDING_AXES 1 if the gradient is sharded over it, else 0; and its local part."""
    axes = sharded_over(grad)
    assert axes <= set(_SHARDING_AXES), f"gradient sharded over {axes}"
    if isinstance(grad, DTensor):
        assert not any(placement.is_partial() for placement in grad.placements)
    return tuple(int(axis in axes) for axis in _SHARDING_AXES), local_part(grad)


def add_tied_gradients(embed: nn.Parameter | None, head: nn.Parameter | None, *, group: dist.ProcessGroup | None) -> None:
    """Give both copies of a tied matrix the sum of their gradients. One of them is None where the other rank of `group` has it."""
    if embed is not None and head is not None:
        total = local_part(embed.grad) + local_part(head.grad)
        for copy in (embed, head):
            local_part(copy.grad).copy_(total)
    elif embed is not None or head is not None:
        dist.all_reduce(local_part((embed if embed is not None else head).grad), group=group)  # type: ignore[union-attr]


def local_part(tensor: Tensor | None) -> Tensor:
    """What this rank holds of a tensor, in the same memory."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
