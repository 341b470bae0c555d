"""Tensor parallelism of one stage: the parameters become DTensors over the tp axis, and its modules compute
with this rank's local tensors (models/slicing.py).

    parameter             stored          gradient of a micro-batch
    cut into equal parts  Shard(dim)      its own
    cut otherwise         Replicate       partial: added over tp ranks once a step
    whole                 Replicate       the same on all ranks, or partial

DTensors, so that gradient norm, optimizer, checkpoints and initial weights need no special case.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from hybridtrain.models import adapters, dora
from hybridtrain.models.slicing import (
    WHOLE,
    Local,
    Piece,
    Slicing,
    partial_gradients,
    pieces,
    rewire,
)
from hybridtrain.models.stage import Stage
from hybridtrain.optim.shards import wide
from hybridtrain.parallel.grad_norm import local_part
from hybridtrain.parallel.mesh import Mesh
from hybridtrain.runtime.collectives import GroupRanks

_COALESCED = 1 << 20
"""Elements up to which gradients are added together in one collective."""


def apply_tensor_parallel(stage: Stage, slicing: Slicing, *, mesh: Mesh) -> None:
    """Cut a stage on meta over the tp axis, in place, but for `localize`. Call before fully_shard."""
    group = mesh.group("tp")
    assert group is not None
    ranks = GroupRanks(group)
    cut = pieces(stage, slicing, rank=ranks.rank, size=ranks.size)
    stage.partial = partial_gradients(stage, slicing) | {
        name for name, each in cut.items() if not each.stored
    }
    rewire(stage, slicing, ranks)
    suffix = f".{adapters.A}.weight"  # cut as the inputs of its layer
    dora.share(stage, ranks, inputs_cut={name.removesuffix(suffix) for name in cut if name.endswith(suffix)})
    for name, _ in list(stage.named_parameters()):
        each = cut.get(name, WHOLE)
        if each.stored:
            _distribute(stage, name, Shard(each.dim), each.ranges[0][1], mesh=mesh)
        else:
            _distribute(stage, name, Replicate(), 0, mesh=mesh)
    stage.tie()
    stage.pieces = cut


def parameters_to_cut(stage: Stage, slicing: Slicing, *, size: int) -> set[str]:
    """Names of the parameters of which a rank stores a part."""
    cut = pieces(stage, slicing, rank=0, size=size)
    return {name for name, each in cut.items() if each.stored}


def localize(stage: Stage) -> None:
    """Let layers, and the stage around them, compute with local tensors; the head takes its own. Under
    recomputation, which repeats it, and outside of compiled code.
    """
    inside = {id(stage.part(stage.structure.head))}
    for index, layer in stage.layer_modules():
        prefix = f"{stage.structure.layers}.{index}."
        inside |= {id(module) for module in layer.modules()}
        layer.forward = Local(layer.forward, _slots(stage, layer.named_modules(prefix=prefix[:-1])))
    outside = ((path, module) for path, module in stage.named_modules() if id(module) not in inside)
    stage.forward = Local(stage.forward, _slots(stage, outside))  # type: ignore[method-assign]


def add_partial_gradients(stages: Iterable[Stage], *, group: dist.ProcessGroup | None) -> None:
    """Complete the gradients of which each tp rank has a part. Once a step: small ones in one collective."""
    small: list[Tensor] = []
    for stage in stages:
        for name, parameter in stage.named_parameters():
            if name in stage.partial and parameter.grad is not None:
                gradient = local_part(parameter.grad)
                if gradient.numel() > _COALESCED:
                    total = wide(gradient)
                    dist.all_reduce(total, group=group)
                    gradient.copy_(total)
                else:
                    small.append(gradient)
    if small:
        total = wide(torch.cat([gradient.flatten() for gradient in small]))
        dist.all_reduce(total, group=group)
        for gradient, part in zip(small, total.split([g.numel() for g in small]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _distribute(stage: Stage, name: str, placement: Placement, length: int, *, mesh: Mesh) -> None:
    """Replace a parameter on meta by a DTensor of the same shape. `length`: of this rank's part."""
    path, _, key = name.rpartition(".")
    module = stage.part(path)
    parameter: Any = module._parameters[key]
    local = parameter.data
    if isinstance(placement, Shard):
        local = local.narrow(placement.dim, 0, length).clone(memory_format=torch.contiguous_format)
    whole = DTensor.from_local(
        local, mesh.tp, [placement], run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    module.register_parameter(key, nn.Parameter(whole, requires_grad=parameter.requires_grad))


def _slots(stage: Stage, modules: Iterable[tuple[str, nn.Module]]) -> list[Any]:
    return [
        (module._parameters, key, functools.partial(_local, stage.pieces.get(f"{path}.{key}", WHOLE)))
        for path, module in modules
        for key, parameter in module._parameters.items()
        if parameter is not None
    ]


def _local(each: Piece, parameter: Any) -> Tensor:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local if each.stored else each.of(local)
