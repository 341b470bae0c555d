"""Tensor parallelism with layers of AutoTP for attention and MLP; embedding, norms and head are replicated.

The layers are inserted by our plan of each family instead of AutoTP's search, so that they work
inside a pipeline too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hybridtrain.models.stage import Stage


@dataclass(frozen=True)
class Part:
    """The part of a parameter on this tensor-parallel rank: full shape, offset and size in each dimension."""

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def sharded(self) -> bool:
        return self.sizes != self.shape


def parts_of(stage: Stage, *, rank: int, size: int) -> dict[str, Part]:
    """Name -> part, for the parameters of an unsharded stage, on tensor-parallel rank `rank` of `size`."""
    dims = (
        {**_dims(stage, "colwise", {"weight": 0, "bias": 0}), **_dims(stage, "rowwise", {"weight": 1})}
        if size > 1
        else {}
    )
    result = {}
    for name, parameter in stage.named_parameters():
        shape = tuple(parameter.shape)
        offsets, sizes = [0] * len(shape), list(shape)
        if name in dims:
            sizes[dims[name]] //= size
            offsets[dims[name]] = rank * sizes[dims[name]]
        result[name] = Part(shape, tuple(offsets), tuple(sizes))
    return result


def _dims(stage: Stage, style: str, dims: dict[str, int]) -> dict[str, int]:
    """Parameter name -> sharded dimension, for the modules of a style."""
    paths = [
        f"{stage.family.layers}.{index}.{path}"
        for index, _ in stage.layer_modules()
        for path, kind in stage.family.tp_plan.items()
        if kind == style
    ]
    return {f"{path}.{name}": dim for path in paths for name, dim in dims.items()}


def replace_linears(stage: Stage, *, group: dist.ProcessGroup) -> None:
    """Replace the linear layers of the plan, on meta, by AutoTP's layers."""
    from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer, set_autotp_mode

    set_autotp_mode(training=True)
    kinds = {"colwise": LinearLayer, "rowwise": LinearAllreduce}
    for _, layer in stage.layer_modules():
        for path, style in stage.family.tp_plan.items():
            if style in kinds:
                parent, _, name = path.rpartition(".")
                owner = layer.get_submodule(parent)
                setattr(owner, name, kinds[style](getattr(owner, name), group, name=path))


def mark(stage: Stage, parts: dict[str, Part], *, group: dist.ProcessGroup) -> None:
    """Mark sharded parameters for DeepSpeed's gradient norm, and sum the gradients of
    norms over single heads.
    """
    for name, parameter in stage.named_parameters():
        parameter.tensor_model_parallel = parts[name].sharded  # type: ignore[attr-defined]
    for _, layer in stage.layer_modules():
        for path, style in stage.family.tp_plan.items():
            if style == "head_norm":
                for parameter in layer.get_submodule(path).parameters():
                    parameter.register_hook(_SumGradient(group))


class _SumGradient:
    """A gradient hook that sums over tensor-parallel ranks in fp32."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def __call__(self, gradient: Tensor) -> Tensor:
        total = gradient.to(torch.float32, copy=True)
        dist.all_reduce(total, group=self.group)
        return total.to(gradient.dtype)
