"""Where DeepSpeed's ZeRO optimizers keep this rank's fp32 weights and Adam moments, as fragments of named parameters.

So a run of either engine is saved in one form, resumed under any layout by either, and exported by one exporter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybridtrain.checkpoint.fragments import Fragment
from hybridtrain.engine.deepspeed.tensor import Part

MOMENTS = ("exp_avg", "exp_avg_sq")


class _AsMade(nn.Module):
    """Gives a module's parameters one at a time, each made when it is asked for: DeepSpeed shares one out before it asks for the next."""

    def __init__(self, module: nn.Module, *, dtype: torch.dtype):
        super().__init__()
        self.places = [(owner, name) for owner in module.modules() for name, _ in owner.named_parameters(recurse=False)]
        self.made: dict[nn.Parameter, nn.Parameter] = {}
        self.dtype_of_all = dtype

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:  # noqa: ARG002 - Module's signature
        for owner, name in self.places:
            empty = getattr(owner, name)
            if empty not in self.made:
                self.made[empty] = nn.Parameter(torch.empty(empty.shape, dtype=self.dtype_of_all))
                yield self.made[empty]
            setattr(owner, name, self.made[empty])


def make_shared_out(stage: nn.Module, *, dtype: torch.dtype, settings: dict[str, Any], mpu: Any) -> None:
    """Make the parameters of a stage on meta, not set yet, as ZeRO 3 holds them (collective): no rank ever holds more than one whole."""
    import deepspeed

    deepspeed.zero.Init(
        module=_AsMade(stage, dtype=dtype),
        config_dict_or_path=settings,
        data_parallel_group=mpu.get_data_parallel_group() if mpu else None,
        mpu=mpu,
    )


@dataclass(frozen=True)
class Held:
    """This rank's run of one parameter: elements `start`.. of its part, in `flat` from `place` on."""

    name: str
    part: Part
    start: int
    count: int
    flat: nn.Parameter
    place: int

    def fragment(self, flat: Tensor) -> Fragment:
        """The run in a tensor that is laid out as `flat`."""
        return Fragment(self.part.shape, self.part.offsets, self.part.sizes, self.start, flat.detach().narrow(0, self.place, self.count))


def held(zero: Any, named: list[tuple[str, nn.Parameter]], *, parts: dict[str, Part]) -> list[Held]:
    """The runs that the ZeRO optimizer `zero` of this rank has of the named parameters."""
    find: Callable[[Any, nn.Parameter], tuple[int, int, Tensor, int] | None] = _of_stage3 if hasattr(zero, "fp32_partitioned_groups_flat") else _of_stage1
    result = []
    for name, parameter in named:
        where = find(zero, parameter)
        if where is not None and where[1] > 0:
            start, count, flat, place = where
            result.append(Held(name, parts[name], start, count, flat, place))  # type: ignore[arg-type]
    return result


def _of_stage1(zero: Any, parameter: nn.Parameter) -> tuple[int, int, Tensor, int] | None:
    """Stages 1 and 2, and the bf16 optimizer: each rank has an equal share of a flat group of parameters."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    groups = zero.single_partition_of_fp32_groups if hasattr(zero, "single_partition_of_fp32_groups") else zero.fp32_groups_flat_partition
    of_parameter, of_flat = mapping.lp_fragment_address, mapping.hp_fragment_address
    return of_parameter.start, of_parameter.numel, groups[mapping.param_group_index], of_flat.start


def _of_stage3(zero: Any, parameter: Any) -> tuple[int, int, Tensor, int] | None:
    """Stage 3: each rank has an equal share of every parameter, the last one padded."""
    group, place, share = zero.grad_position[zero.get_param_id(parameter)]
    start = torch.distributed.get_rank(zero._get_param_partition_group(parameter)) * share
    return start, max(0, min(share, parameter.ds_numel - start)), zero.fp32_partitioned_groups_flat[group], place


def optimizer_state(optimizer: torch.optim.Optimizer, flat: nn.Parameter) -> dict[str, Tensor]:
    """Adam's state of a flat group; created if not there yet."""
    state = optimizer.state[flat]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        state.update({moment: torch.zeros_like(flat.data) for moment in MOMENTS})
    return state


def tensors(runs: list[Held], optimizer: torch.optim.Optimizer, *, owner: Callable[[str], str]) -> dict[str, Tensor | Fragment]:
    """Everything a checkpoint holds of these runs, sharing memory with the training."""
    result: dict[str, Tensor | Fragment] = {}
    for run in runs:
        name, state = owner(run.name), optimizer_state(optimizer, run.flat)
        result[f"model.{name}"] = run.fragment(run.flat)
        result[f"optim.{name}.step"] = state["step"]
        result |= {f"optim.{name}.{moment}": run.fragment(state[moment]) for moment in MOMENTS}
    return result


@torch.no_grad()
def fill(runs: list[Held], source: Any, *, owner: Callable[[str], str]) -> None:
    """Write initial weights in fp32: DeepSpeed's masters are copies of parameters that it has rounded to 16 bits before."""
    for run in runs:
        for box, piece in run.fragment(run.flat).slices():
            piece.copy_(source(owner(run.name), run.part.shape, box))


@torch.no_grad()
def publish(zero: Any) -> None:
    """Give the model's parameters the values of the fp32 weights (collective)."""
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        zero.update_lp_params()
        return
    zero._partition_all_parameters()
    for group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


@dataclass(frozen=True)
class Gathered:
    """A parameter (or gradient) of which each rank has a run, or nothing; `full_tensor` as DTensor has it."""

    shape: tuple[int, ...]
    fragment: Fragment | None
    """None where this rank has nothing of it, or another rank has the same."""
    group: torch.distributed.ProcessGroup | None
    """The ranks of a pipeline stage; None: this one has it alone."""

    def full_tensor(self) -> Tensor:
        """The whole, fp32, on the CPU (collective over the ranks of a pipeline stage)."""
        whole = torch.zeros(self.shape)
        if self.fragment is not None:
            self.fragment.fill(whole)
        if self.group is not None:
            torch.distributed.all_reduce(whole, group=self.group)
        return whole


def gathered(
    runs: list[Held], named: list[tuple[str, Part]], *, values: Callable[[Held], Tensor], speaks: Callable[[Part], bool], group: Any
) -> Iterator[tuple[str, Gathered]]:
    """Every named parameter with what this rank adds to it. `speaks`: of the ranks that hold the same part, one gives it."""
    by_name = {run.name: run for run in runs}
    for name, part in named:
        run = by_name.get(name)
        yield name, Gathered(part.shape, run.fragment(values(run)) if run and speaks(part) else None, group)
