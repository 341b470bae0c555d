"""Finds this rank's fp32 weights and Adam moments in DeepSpeed's ZeRO optimizers, as
fragments of named parameters.

So checkpoints of both engines have one format: either engine resumes them in any layout, and
one exporter reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybridtrain.checkpoint.fragments import Fragment
from hybridtrain.engine.deepspeed.tensor import Part
from hybridtrain.errors import refusal

MOMENTS = ("exp_avg", "exp_avg_sq")


class _LazyParameters(nn.Module):
    """Allocates a module's parameters one at a time, as DeepSpeed iterates over them: it shards
    each before the next.
    """

    def __init__(self, module: nn.Module, *, dtype: torch.dtype):
        super().__init__()
        self.owners = [
            (owner, name) for owner in module.modules() for name, _ in owner.named_parameters(recurse=False)
        ]
        self.allocated: dict[nn.Parameter, nn.Parameter] = {}
        self.dtype_of_all = dtype

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:  # noqa: ARG002 - Module's signature
        for owner, name in self.owners:
            on_meta = getattr(owner, name)
            if on_meta not in self.allocated:
                self.allocated[on_meta] = nn.Parameter(torch.empty(on_meta.shape, dtype=self.dtype_of_all))
                yield self.allocated[on_meta]
            setattr(owner, name, self.allocated[on_meta])


def allocate_sharded(stage: nn.Module, *, dtype: torch.dtype, settings: dict[str, Any], mpu: Any) -> None:
    """Allocate a stage on meta, sharded as in ZeRO 3, with uninitialized weights (collective).

    No rank ever holds more than one full parameter.
    """
    import deepspeed

    deepspeed.zero.Init(
        module=_LazyParameters(stage, dtype=dtype),
        config_dict_or_path=settings,
        data_parallel_group=mpu.get_data_parallel_group() if mpu else None,
        mpu=mpu,
    )


@dataclass(frozen=True)
class FlatShard:
    """This rank's shard of a parameter: `count` elements of its flattened part from `start` on, in
    `flat` from `offset` on.
    """

    name: str
    part: Part
    start: int
    count: int
    flat: nn.Parameter
    offset: int

    def fragment(self, flat: Tensor) -> Fragment:
        """The shard's fragment of a tensor with the layout of `self.flat`."""
        return Fragment(
            self.part.shape,
            self.part.offsets,
            self.part.sizes,
            self.start,
            flat.detach().narrow(0, self.offset, self.count),
        )


def flat_shards(
    zero: Any, named: list[tuple[str, nn.Parameter]], *, parts: dict[str, Part]
) -> list[FlatShard]:
    """The shards of the named parameters in this rank's ZeRO optimizer `zero`."""
    find: Callable[[Any, nn.Parameter], tuple[int, int, Tensor, int] | None] = (
        _of_stage3 if hasattr(zero, "fp32_partitioned_groups_flat") else _of_stage1
    )
    result = []
    for name, parameter in named:
        shard = find(zero, parameter)
        if shard is not None and shard[1] > 0:
            start, count, flat, offset = shard
            result.append(FlatShard(name, parts[name], start, count, flat, offset))  # type: ignore[arg-type]
    return result


def _of_stage1(zero: Any, parameter: nn.Parameter) -> tuple[int, int, Tensor, int] | None:
    """(start, count, flat, offset) for stages 1 and 2 and the bf16 optimizer: a rank has a share of a
    flat group of parameters.
    """
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    groups = (
        zero.single_partition_of_fp32_groups
        if hasattr(zero, "single_partition_of_fp32_groups")
        else zero.fp32_groups_flat_partition
    )
    of_parameter, of_flat = mapping.lp_fragment_address, mapping.hp_fragment_address
    return of_parameter.start, of_parameter.numel, groups[mapping.param_group_index], of_flat.start


def _of_stage3(zero: Any, parameter: Any) -> tuple[int, int, Tensor, int] | None:
    """(start, count, flat, offset) for stage 3: a rank has a share of every parameter; the
    last share is padded.
    """
    group, offset, share = zero.grad_position[zero.get_param_id(parameter)]
    start = torch.distributed.get_rank(zero._get_param_partition_group(parameter)) * share
    return (
        start,
        max(0, min(share, parameter.ds_numel - start)),
        zero.fp32_partitioned_groups_flat[group],
        offset,
    )


def optimizer_state(optimizer: torch.optim.Optimizer, flat: nn.Parameter) -> dict[str, Tensor]:
    """Adam's state of a flat group; created if it does not exist."""
    state = optimizer.state[flat]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        state.update({moment: torch.zeros_like(flat.data) for moment in MOMENTS})
    return state


def check_moments(stored: Collection[str], *, path: Path) -> None:
    """Raise UserError for a checkpoint (its keys) with moments in 8 bits."""
    if any(key.startswith("optim.") and key.endswith("_codes") for key in stored):
        raise refusal(
            "checkpoint",
            path,
            "its optimizer state is in 8 bits (precision.state=8bit), which engine=deepspeed does not read",
            allowed="moments in fp32 or bf16",
            instead="engine=torch; with precision.state=fp32 its checkpoints can be continued here",
        )


def tensors(
    shards: list[FlatShard], optimizer: torch.optim.Optimizer, *, owner: Callable[[str], str]
) -> dict[str, Tensor | Fragment]:
    """Weights, moments and step of these shards by their names in checkpoints, sharing
    memory with the training.
    """
    result: dict[str, Tensor | Fragment] = {}
    for shard in shards:
        name, state = owner(shard.name), optimizer_state(optimizer, shard.flat)
        result[f"model.{name}"] = shard.fragment(shard.flat)
        result[f"optim.{name}.step"] = state["step"]
        result |= {f"optim.{name}.{moment}": shard.fragment(state[moment]) for moment in MOMENTS}
    return result


@torch.no_grad()
def fill(shards: list[FlatShard], source: Any, *, owner: Callable[[str], str]) -> None:
    """Write initial weights to the fp32 master weights, which DeepSpeed copies from parameters
    rounded to 16 bits.
    """
    for shard in shards:
        for slices, piece in shard.fragment(shard.flat).slices():
            piece.copy_(source(owner(shard.name), shard.part.shape, slices))


@torch.no_grad()
def update_model(zero: Any) -> None:
    """Copy the fp32 master weights to the model's parameters (collective)."""
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        zero.update_lp_params()
        return
    zero._partition_all_parameters()
    for group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


@dataclass(frozen=True)
class ShardedTensor:
    """A parameter or gradient that is sharded over the ranks of a pipeline stage,
    with `full_tensor` like DTensor.
    """

    shape: tuple[int, ...]
    fragment: Fragment | None
    """This rank's; None if it has none, or if another rank has the same one."""
    group: torch.distributed.ProcessGroup | None
    """The ranks of the pipeline stage; None: only this rank."""

    def full_tensor(self) -> Tensor:
        """The full tensor, fp32, on the CPU (collective over the ranks of the pipeline stage)."""
        full = torch.zeros(self.shape)
        if self.fragment is not None:
            self.fragment.fill(full)
        if self.group is not None:
            torch.distributed.all_reduce(full, group=self.group)
        return full


def sharded_tensors(
    shards: list[FlatShard],
    named: list[tuple[str, Part]],
    *,
    values: Callable[[FlatShard], Tensor],
    contributes: Callable[[Part], bool],
    group: Any,
) -> Iterator[tuple[str, ShardedTensor]]:
    """Every named parameter.

    `contributes`: whether this rank is the one, of those with the same part, that provides it.
    """
    by_name = {shard.name: shard for shard in shards}
    for name, part in named:
        shard = by_name.get(name)
        yield (
            name,
            ShardedTensor(
                part.shape, shard.fragment(values(shard)) if shard and contributes(part) else None, group
            ),
        )
