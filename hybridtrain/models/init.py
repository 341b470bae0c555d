"""Initial weights that do not depend on the layout.

Each parameter is drawn whole from a generator with the key (seed, Hugging Face name), then sliced:
each element has the same value under every layout, engine and world size. One whole parameter is in
memory at a time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from hybridtrain.models.family import Family
from hybridtrain.models.stage import Stage

Slices = tuple[slice, ...]
WeightSource = Callable[[str, tuple[int, ...], Slices], Tensor]
"""(parameter name, whole shape, slices) -> the values in these slices of the parameter."""


def draw(config: Any, *, family: Family, seed: int) -> WeightSource:
    """Random initial weights, distributed as `family.initial` defines."""

    def values(name: str, shape: tuple[int, ...], slices: Slices) -> Tensor:
        std = family.initial(config, name)
        if std is None:
            return torch.full(shape, 0.0 if name.endswith(".bias") else 1.0)[slices]
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        whole = torch.randn(shape, generator=generator).mul_(std)
        padding = config.pad_token_id
        if name == f"{family.embed}.weight" and padding is not None and 0 <= padding < shape[0]:
            whole[padding] = 0.0
        return whole[slices]

    return values


@torch.no_grad()
def fill(stages: Iterable[Stage], source: WeightSource) -> None:
    """Set this rank's part of every parameter.

    A tied head has the embedding's values, also on another stage.
    """
    for stage in stages:
        for name, parameter in stage.named_parameters():
            slices = local_slices(parameter)
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if math.prod(local.shape):
                local.copy_(source(stage.owner(name), tuple(parameter.shape), slices))


def local_slices(parameter: Tensor) -> Slices:
    """The slices of the whole parameter that this rank holds."""
    if not isinstance(parameter, DTensor):
        return tuple(slice(0, size) for size in parameter.shape)
    sizes, offsets = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))


def reset_buffers(stage: Stage, *, device: torch.device) -> None:
    """Recompute the rotary frequencies: `to_empty` leaves them uninitialized, and no checkpoint has them."""
    module = stage.part(stage.family.rotary)
    fresh = type(module)(config=stage.config)
    for name, buffer in fresh.named_buffers():
        setattr(module, name, nn.Buffer(buffer.to(device), persistent=False))
