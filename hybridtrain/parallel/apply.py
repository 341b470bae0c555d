"""From a layout to this rank's parallel stages: `ORDER` is the one place that knows what is done to a stage, and when.

    cut on meta -> tensor -> freeze -> recompute -> compile -> shard -> materialise -> what was done is held against what was asked for

A transform is a row of the table: what it does to a stage, what the config asks of it, and what the finished stage shows of it.
The last two are sets of names (of parameters, layers, modules) that must be equal: nothing that was asked for is dropped in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from hybridtrain.config.schema import EngineConfig, ParallelConfig
from hybridtrain.models.family import Family
from hybridtrain.models.init import reset_buffers
from hybridtrain.models.patterns import matches
from hybridtrain.models.stage import Stage
from hybridtrain.parallel.fsdp import apply_shard, ends, settle_shards, wrapped_modules
from hybridtrain.parallel.mesh import Mesh, sharded_over
from hybridtrain.parallel.pipeline import stage_ids
from hybridtrain.parallel.recompute import apply_compile, apply_recompute, wrappers
from hybridtrain.parallel.slicing import apply_tensor_parallel, parameters_to_slice, settle_embedding
from hybridtrain.plan.layout import stage_layers
from hybridtrain.plan.schedules import SPLIT_BACKWARD, stages_per_rank
from hybridtrain.precision.policy import PrecisionPolicy
from hybridtrain.tasks.head import Head
from hybridtrain.tasks.task import Task


@dataclass(frozen=True)
class Context:
    """What shapes a stage besides the model: this rank's mesh, the sections of the config that choose transforms, the task."""

    mesh: Mesh
    parallel: ParallelConfig
    engine: EngineConfig
    precision: PrecisionPolicy
    recompute: str
    freeze: list[str]
    task: Task


Names = Callable[[Stage, Context], set[str]]


@dataclass(frozen=True)
class Transform:
    """A row of the table."""

    name: str
    apply: Callable[[Stage, Context], None]
    asked: Names
    """What the config asks for."""
    done: Names
    """The same, as the stage shows it after all transforms."""


def build_stages(config: Any, *, family: Family, context: Context) -> tuple[list[int], list[Stage]]:
    """This rank's stage numbers and stages, parallel, allocated, their weights not yet set."""
    mesh, parallel = context.mesh, context.parallel
    pp, per_rank = mesh.layout.pp, stages_per_rank(parallel)
    cuts = stage_layers(config.num_hidden_layers, pp * per_rank)
    ids = stage_ids(mesh.coordinates["pp"], pp=pp, per_rank=per_rank, schedule=parallel.schedule)
    stages = []
    for index in ids:
        head = partial(Head, task=context.task, loss_chunk=context.engine.loss_chunk)
        stage = Stage(config, family=family, layers=cuts[index], first=index == 0, last=index == len(cuts) - 1, head=head)
        stage.to(context.precision.param)
        transform(stage, context, order=ORDER)
        check(stage, context, order=ORDER)
        stages.append(stage)
    return ids, stages


def transform(stage: Stage, context: Context, *, order: Sequence[Transform]) -> None:
    """Apply the transforms, each as far as its section of the config asks for it."""
    for each in order:
        each.apply(stage, context)


def check(stage: Stage, context: Context, *, order: Sequence[Transform]) -> None:
    """Hold what each transform did against what was asked of it. A difference is a mistake of ours: it would train something else."""
    for each in order:
        asked, done = each.asked(stage, context), each.done(stage, context)
        assert asked == done, f"transform {each.name}: not done {sorted(asked - done)}, not asked for {sorted(done - asked)}"


# -- tensor ------------------------------------------------------------------------------------------------------


def _slice(stage: Stage, context: Context) -> None:
    apply_tensor_parallel(stage, mesh=context.mesh, sequence_parallel=context.parallel.sequence_parallel)


def _to_slice(stage: Stage, context: Context) -> set[str]:
    return parameters_to_slice(stage, tp=context.mesh.layout.tp)


def _sliced(stage: Stage, context: Context) -> set[str]:
    return _over(stage, "tp") if context.mesh.layout.tp > 1 else set()


# -- freeze ------------------------------------------------------------------------------------------------------


def _freeze(stage: Stage, context: Context) -> None:
    for name, parameter in stage.named_parameters():
        if matches(stage.owner(name), context.freeze):
            parameter.requires_grad_(False)


def _to_freeze(stage: Stage, context: Context) -> set[str]:
    """A pattern that matches nothing here may match on another stage; one that matches nowhere has been refused (models/patterns.py)."""
    return {name for name in _parameters(stage) if matches(stage.owner(name), context.freeze)}


def _frozen(stage: Stage, context: Context) -> set[str]:  # noqa: ARG001 - the signature of Names
    return {name for name, parameter in _parameters(stage).items() if not parameter.requires_grad}


# -- recompute, compile ------------------------------------------------------------------------------------------


def _recompute_last(context: Context) -> bool:
    """Whole layers are recomputed around the compiled layer under tensor parallelism, not inside it.

    There torch 2.13 cannot save what such a graph hands to its backward pass (a DeviceMesh). Nothing is lost: with `full` nothing
    of a layer is kept in either order.
    """
    return context.engine.compile and context.recompute == "full" and context.mesh.layout.tp > 1


def _recompute(stage: Stage, context: Context) -> None:
    if not _recompute_last(context):
        split = context.parallel.schedule in SPLIT_BACKWARD and not context.engine.compile
        apply_recompute(stage, kind=context.recompute, split_backward=split)


def _compile(stage: Stage, context: Context) -> None:
    if context.engine.compile:
        if context.mesh.layout.tp > 1:
            settle_embedding(stage)
        apply_compile(stage, backend=context.engine.compile_backend)
    if _recompute_last(context):
        apply_recompute(stage, kind=context.recompute, split_backward=False)


def _to_recompute(stage: Stage, context: Context) -> set[str]:
    return _layers(stage) if context.recompute != "none" else set()


def _to_compile(stage: Stage, context: Context) -> set[str]:
    return _layers(stage) if context.engine.compile else set()


def _wrapped_by(kind: str) -> Names:
    return lambda stage, context: {path for path in _layers(stage) if kind in wrappers(stage.part(path))}  # noqa: ARG005


# -- shard -------------------------------------------------------------------------------------------------------


def _shard(stage: Stage, context: Context) -> None:
    apply_shard(stage, mesh=context.mesh, zero_stage=context.parallel.zero_stage, precision=context.precision)


def _to_shard(stage: Stage, context: Context) -> set[str]:
    """Wrapped, by what reduces gradients and casts: all layers, the ends and the stage ("") itself. Sharded, from ZeRO 1 on: all parameters."""
    layout, precision = context.mesh.layout, context.precision
    wrap = layout.dp > 1 or layout.tp > 1 or {precision.compute, precision.reduce} != {precision.param}
    beside = {path for paths in ends(stage) for path in paths}
    return ({*_layers(stage), *beside, ""} if wrap else set()) | (set(_parameters(stage)) if layout.dp_shard > 1 else set())


def _sharded(stage: Stage, context: Context) -> set[str]:
    return wrapped_modules(stage) | (_over(stage, "dp_shard") if context.mesh.layout.dp_shard > 1 else set())


# -- materialise -------------------------------------------------------------------------------------------------


def _materialise(stage: Stage, context: Context) -> None:
    stage.to_empty(device=context.mesh.device)
    stage.tie()  # to_empty, too, makes two of them where fully_shard has not wrapped the stage
    settle_shards(stage)
    reset_buffers(stage, device=context.mesh.device)


def _to_materialise(stage: Stage, context: Context) -> set[str]:  # noqa: ARG001 - the signature of Names
    """Everything, and of a tied matrix one copy."""
    return {*_parameters(stage), *dict(stage.named_buffers())} - ({f"{stage.family.head}.weight"} if stage.tied and stage.first else set())


def _materialised(stage: Stage, context: Context) -> set[str]:
    tensors = {**_parameters(stage), **dict(stage.named_buffers())}
    return {name for name, tensor in tensors.items() if tensor.device.type == context.mesh.device.type}


def _parameters(stage: Stage) -> dict[str, nn.Parameter]:
    return dict(stage.named_parameters())


def _layers(stage: Stage) -> set[str]:
    return {f"{stage.family.layers}.{index}" for index in stage.layers}


def _over(stage: Stage, axis: str) -> set[str]:
    """Parameters that are sharded over a mesh axis."""
    return {name for name, parameter in stage.named_parameters() if axis in sharded_over(parameter)}


RECOMPUTE = Transform("recompute", _recompute, _to_recompute, _wrapped_by("recompute"))

ORDER = (
    Transform("tensor", _slice, _to_slice, _sliced),
    Transform("freeze", _freeze, _to_freeze, _frozen),  # after tensor: its styles make parameters that require gradients
    RECOMPUTE,
    Transform("compile", _compile, _to_compile, _wrapped_by("compile")),  # around recompute: one graph decides what is kept
    Transform("shard", _shard, _to_shard, _sharded),
    Transform("materialise", _materialise, _to_materialise, _materialised),
)
