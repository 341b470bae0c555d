"""Tensor parallelism with AutoTP's layers: columns, then rows, of attention and MLP; embedding, norms and head are whole on every rank.

The layers are put in by our own plan of each family instead of AutoTP's search, so that they also work inside a pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hybridtrain.models.stage import Stage


@dataclass(frozen=True)
class Part:
    """Where this rank's part of a parameter lies in the whole."""

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def sharded(self) -> bool:
        return self.sizes != self.shape


def parts_of(stage: Stage, *, rank: int, size: int) -> dict[str, Part]:
    """The part of every parameter of a whole stage that tensor-parallel rank `rank` of `size` holds."""
    dims = {**_dims(stage, "colwise", {"weight": 0, "bias": 0}), **_dims(stage, "rowwise", {"weight": 1})} if size > 1 else {}
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
    """Parameter name -> the dimension it is cut along, for the modules of a style."""
    paths = [f"{stage.family.layers}.{index}.{path}" for index, _ in stage.layer_modules() for path, kind in stage.family.tp_plan.items() if kind == style]
    return {f"{path}.{name}": dim for path in paths for name, dim in dims.items()}


def replace_linears(stage: Stage, *, group: dist.ProcessGroup) -> None:
    """Put AutoTP's layers in the place of the plan's linear layers. On meta: nothing is copied."""
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
    """Tell DeepSpeed's norm which parameters are shared out, and add up the gradients of norms that see this rank's heads only."""
    for name, parameter in stage.named_parameters():
        parameter.tensor_model_parallel = parts[name].sharded  # type: ignore[attr-defined]
    for _, layer in stage.layer_modules():
        for path, style in stage.family.tp_plan.items():
            if style == "head_norm":
                for parameter in layer.get_submodule(path).parameters():
                    parameter.register_hook(_Summed(group))


class _Summed:
    """A gradient hook: the sum over tensor-parallel ranks, in fp32."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def __call__(self, gradient: Tensor) -> Tensor:
        total = gradient.to(torch.float32, copy=True)
        dist.all_reduce(total, group=self.group)
        return total.to(gradient.dtype)
