"""Tensor parallelism with layers of AutoTP for attention and MLP; embedding, norms and head are replicated.

The layers are inserted where the model's slicing (analysis/slices.py) cuts linear layers, instead of by
AutoTP's search, so that they work inside a pipeline too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hybridtrain.models.slicing import Slicing, pieces
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


def parts_of(stage: Stage, slicing: Slicing, *, rank: int, size: int) -> dict[str, Part]:
    """Name -> part, for the parameters of an unsharded stage, on tensor-parallel rank `rank` of `size`."""
    cut = pieces(stage, slicing, rank=rank, size=size) if size > 1 else {}
    result = {}
    for name, parameter in stage.named_parameters():
        shape = tuple(parameter.shape)
        offsets, sizes = [0] * len(shape), list(shape)
        if name in cut and cut[name].stored:
            [(offsets[cut[name].dim], sizes[cut[name].dim])] = cut[name].ranges
        result[name] = Part(shape, tuple(offsets), tuple(sizes))
    return result


def replace_linears(stage: Stage, slicing: Slicing, *, group: dist.ProcessGroup) -> None:
    """Replace the linear layers that are cut, on meta, by AutoTP's layers."""
    from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer, set_autotp_mode

    set_autotp_mode(training=True)
    for _, layer in stage.layer_modules():
        inside = {name for name, _ in layer.named_parameters()}
        for name in inside & set(slicing.cuts):
            path, _, key = name.rpartition(".")
            if key == "weight":
                parent, _, attribute = path.rpartition(".")
                owner = layer.get_submodule(parent)
                kind = LinearLayer if slicing.cuts[name].startswith("0") else LinearAllreduce
                setattr(owner, attribute, kind(getattr(owner, attribute), group, name=path))


def mark(stage: Stage, slicing: Slicing, parts: dict[str, Part], *, group: dist.ProcessGroup) -> None:
    """Mark sharded parameters for DeepSpeed's gradient norm, and sum the gradients of which each rank has a
    part, such as those of norms over single heads.
    """
    for name, parameter in stage.named_parameters():
        parameter.tensor_model_parallel = parts[name].sharded  # type: ignore[attr-defined]
    for _, layer in stage.layer_modules():
        for name, parameter in layer.named_parameters():
            # AutoTP adds the bias of a row-parallel layer after its sum.
            if name in slicing.partial and slicing.cuts.get(name) != "share":
                parameter.register_hook(_SumGradient(group))


class _SumGradient:
    """A gradient hook that sums over tensor-parallel ranks in fp32."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def __call__(self, gradient: Tensor) -> Tensor:
        total = gradient.to(torch.float32, copy=True)
        dist.all_reduce(total, group=self.group)
        return total.to(gradient.dtype)
