"""Builds this rank's parallel stages from a layout.

`ORDER` lists the transforms in the order in which they are applied.

    stage on meta -> tensor -> convert -> freeze -> recompute -> compile -> local -> shard -> materialize
                  -> check

A transform is a function that changes a stage, and two that return sets of names (of parameters, layers,
modules): those that the config asks for, and those that the finished stage shows. Both must be equal, so that
no transform is skipped silently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from hybridtrain.analysis.facts import facts_of
from hybridtrain.config.schema import Config, EngineConfig, ParallelConfig, PrecisionConfig
from hybridtrain.models.init import reset_buffers
from hybridtrain.models.patterns import matches
from hybridtrain.models.slicing import Slicing
from hybridtrain.models.stage import Stage
from hybridtrain.parallel import convert
from hybridtrain.parallel.fsdp import apply_shard, pad_shards, wrapped_modules
from hybridtrain.parallel.mesh import Mesh, sharded_over
from hybridtrain.parallel.recompute import allow_graphs, apply_compile, apply_recompute, wrappers
from hybridtrain.parallel.slicing import apply_tensor_parallel, localize, parameters_to_cut
from hybridtrain.plan import stages
from hybridtrain.plan.batch import BatchPlan
from hybridtrain.plan.formats import HIGH
from hybridtrain.plan.schedules import SPLIT_BACKWARD
from hybridtrain.plan.stages import Cut
from hybridtrain.precision.double import compute_in_double
from hybridtrain.precision.policy import PrecisionPolicy
from hybridtrain.runtime.collectives import GroupRanks
from hybridtrain.tasks.head import Head
from hybridtrain.tasks.task import Task


@dataclass(frozen=True)
class Context:
    """What the transforms depend on besides the model: this rank's mesh, sections of the config, the task,
    and how tensor parallelism cuts the layers.
    """

    mesh: Mesh
    parallel: ParallelConfig
    engine: EngineConfig
    precision: PrecisionPolicy
    formats: PrecisionConfig
    recompute: str
    freeze: list[str]
    task: Task
    slicing: Slicing
    cut: Cut

    @classmethod
    def of(
        cls,
        config: Config,
        *,
        mesh: Mesh,
        plan: BatchPlan,
        precision: PrecisionPolicy,
        task: Task,
        slicing: Slicing,
    ) -> Context:
        """That of a run's config."""
        parallel, facts = config.parallel, facts_of(config.model)
        cut = stages.cut(config, parallel=parallel, pp=mesh.layout.pp, plan=plan, facts=facts)
        recompute, freeze = config.recompute.kind, config.model.freeze
        formats = config.precision
        return cls(mesh, parallel, config.engine, precision, formats, recompute, freeze, task, slicing, cut)


Names = Callable[[Stage, Context], set[str]]
_CHANGES = 8
"""Formats that the layers of a model change in one run, for each layer; on average fewer."""


@dataclass(frozen=True)
class Transform:
    """A row of `ORDER`."""

    name: str
    apply: Callable[[Stage, Context], None]
    expected: Names
    """From the config."""
    actual: Names
    """From the stage after all transforms."""


def build_stages(config: Any, *, context: Context) -> tuple[list[int], list[Stage]]:
    """(numbers, stages) of this rank, transformed and allocated, with uninitialized weights."""
    layers, ids = context.cut.layers, list(context.cut.ranks[context.mesh.coordinates["pp"]])
    stages = []
    for index in ids:
        head = partial(Head, task=context.task, loss_chunk=context.engine.loss_chunk)
        stage = Stage(
            config,
            layers=layers[index],
            first=index == 0,
            last=index == len(layers) - 1,
            head=head,
        )
        stage.to(context.precision.param)
        transform(stage, context, order=ORDER)
        check(stage, context, order=ORDER)
        stages.append(stage)
    return ids, stages


def transform(stage: Stage, context: Context, *, order: Sequence[Transform]) -> None:
    """Apply the transforms that the config asks for."""
    for each in order:
        each.apply(stage, context)


def check(stage: Stage, context: Context, *, order: Sequence[Transform]) -> None:
    """Compare what each transform did with what the config asks for.

    A difference is a bug in this package.
    """
    for each in order:
        expected, actual = each.expected(stage, context), each.actual(stage, context)
        assert expected == actual, (
            f"transform {each.name}: not done {sorted(expected - actual)}, "
            f"not asked for {sorted(actual - expected)}"
        )


# -- tensor --------------------------------------------------------------------------------------------------


def _slice(stage: Stage, context: Context) -> None:
    if context.mesh.layout.tp > 1:
        apply_tensor_parallel(stage, context.slicing, mesh=context.mesh)


def _to_slice(stage: Stage, context: Context) -> set[str]:
    tp = context.mesh.layout.tp
    return parameters_to_cut(stage, context.slicing, size=tp) if tp > 1 else set()


def _sliced(stage: Stage, context: Context) -> set[str]:
    return _over(stage, "tp") if context.mesh.layout.tp > 1 else set()


# -- convert -------------------------------------------------------------------------------------------------


def _convert(stage: Stage, context: Context) -> None:
    converter(context).apply(stage)


def converter(context: Context) -> convert.Converter:
    """What converts the linear layers of stages."""
    group = context.mesh.group("tp")
    ranks = None if group is None else GroupRanks(group)
    return convert.Converter(
        context.formats, slicing=context.slicing, ranks=ranks, device=context.mesh.device
    )


def _to_convert(stage: Stage, context: Context) -> set[str]:
    return {path for path, name in convert.formats(stage, context.formats).items() if name != HIGH}


def _converted(stage: Stage, context: Context) -> set[str]:  # noqa: ARG001 - the signature of Names
    return convert.converted(stage)


# -- double ------------------------------------------------------------------------------------------------


def _double(stage: Stage, context: Context) -> None:
    if context.precision.compute == torch.float64:
        for module in (stage, *(layer for _, layer in stage.layer_modules())):
            compute_in_double(module)


def _to_double(stage: Stage, context: Context) -> set[str]:
    return {"", *_layers(stage)} if context.precision.compute == torch.float64 else set()


def _doubled(stage: Stage, context: Context) -> set[str]:
    if context.precision.compute != torch.float64:
        return set()
    return {path for path in ("", *_layers(stage)) if "double" in wrappers(stage.part(path))}


# -- freeze --------------------------------------------------------------------------------------------------


def _freeze(stage: Stage, context: Context) -> None:
    for name, parameter in stage.named_parameters():
        if matches(stage.owner(name), context.freeze):
            parameter.requires_grad_(False)


def _to_freeze(stage: Stage, context: Context) -> set[str]:
    """A pattern may match nothing on this stage; one that matches on no stage
    is refused by models/patterns.py.
    """
    frozen = {name for name in _parameters(stage) if matches(stage.owner(name), context.freeze)}
    return frozen | stage.untrained


def _frozen(stage: Stage, context: Context) -> set[str]:  # noqa: ARG001 - the signature of Names
    return {name for name, parameter in _parameters(stage).items() if not parameter.requires_grad}


# -- recompute, compile --------------------------------------------------------------------------------------


def _recompute(stage: Stage, context: Context) -> None:
    split = context.parallel.schedule in SPLIT_BACKWARD and not context.engine.compile
    apply_recompute(stage, kind=context.recompute, split_backward=split)


def _recompute_first(context: Context) -> bool:
    """With tensor parallelism, only selective recomputation of compiled layers is inside, see recompute.py.
    Else it repeats what gives a layer its local tensors, which is outside of compiled code.
    """
    selective = context.engine.compile and context.recompute == "selective"
    return selective or context.mesh.layout.tp == 1


def _recompute_inside(stage: Stage, context: Context) -> None:
    if _recompute_first(context):
        _recompute(stage, context)


def _compile(stage: Stage, context: Context) -> None:
    if context.engine.compile:
        apply_compile(stage, backend=context.engine.compile_backend)
    if context.engine.compile and context.formats.adaptive:
        allow_graphs(_CHANGES * sum(1 for _ in stage.layer_modules()))


def _localize(stage: Stage, context: Context) -> None:
    if context.mesh.layout.tp > 1:
        localize(stage)
    if not _recompute_first(context):
        _recompute(stage, context)


def _to_localize(stage: Stage, context: Context) -> set[str]:
    return _layers(stage) if context.mesh.layout.tp > 1 else set()


def _to_recompute(stage: Stage, context: Context) -> set[str]:
    return _layers(stage) if context.recompute != "none" else set()


def _to_compile(stage: Stage, context: Context) -> set[str]:
    return _layers(stage) if context.engine.compile else set()


def _wrapped_by(kind: str) -> Names:
    return lambda stage, context: {path for path in _layers(stage) if kind in wrappers(stage.part(path))}  # noqa: ARG005


# -- shard ---------------------------------------------------------------------------------------------------


def _shard(stage: Stage, context: Context) -> None:
    apply_shard(
        stage,
        mesh=context.mesh,
        zero_stage=zero_stage_of(context.engine, context.parallel),
        precision=context.precision,
        offload=_offloads(context),
    )


def zero_stage_of(engine: EngineConfig, parallel: ParallelConfig) -> int:
    """The stage as which parameters are gathered and gradients reduced: offloaded ones layer by layer."""
    return 3 if engine.offload_parameters == "cpu" else parallel.zero_stage


def _offloads(context: Context) -> bool:
    return context.engine.offload_parameters == "cpu"


def _to_shard(stage: Stage, context: Context) -> set[str]:
    """Wrapped modules: all layers and the stage ("").

    Sharded parameters, from ZeRO 1 on: all.
    """
    layout, precision = context.mesh.layout, context.precision
    casts = {precision.compute, precision.reduce} != {precision.param}
    wrap = layout.dp > 1 or casts or _offloads(context)
    wrapped = {*_layers(stage), ""} if wrap else set()
    return wrapped | (set(_parameters(stage)) if layout.dp_shard > 1 else set())


def _sharded(stage: Stage, context: Context) -> set[str]:
    return wrapped_modules(stage) | (_over(stage, "dp_shard") if context.mesh.layout.dp_shard > 1 else set())


# -- materialize
# -------------------------------------------------------------------------------------------------


def _materialize(stage: Stage, context: Context) -> None:
    stage.to_empty(device="cpu" if _offloads(context) else context.mesh.device)  # buffers follow below
    stage.tie()  # to_empty unties the weights of a stage that fully_shard has not wrapped
    pad_shards(stage)
    reset_buffers(stage, device=context.mesh.device)


def _to_materialize(stage: Stage, context: Context) -> set[str]:  # noqa: ARG001 - the signature of Names
    """All parameters and buffers; a tied matrix once."""
    return {*_parameters(stage), *dict(stage.named_buffers())} - (
        {f"{stage.structure.head}.weight"} if stage.tied and stage.first else set()
    )


def _materialized(stage: Stage, context: Context) -> set[str]:
    device = context.mesh.device.type
    kept = "cpu" if _offloads(context) else device
    parameters = {name for name, each in _parameters(stage).items() if each.device.type == kept}
    return parameters | {name for name, each in stage.named_buffers() if each.device.type == device}


def _parameters(stage: Stage) -> dict[str, nn.Parameter]:
    return dict(stage.named_parameters())


def _layers(stage: Stage) -> set[str]:
    return {f"{stage.structure.layers}.{index}" for index in stage.layers}


def _over(stage: Stage, axis: str) -> set[str]:
    """Parameters that are sharded over a mesh axis."""
    return {name for name, parameter in stage.named_parameters() if axis in sharded_over(parameter)}


RECOMPUTE = Transform("recompute", _recompute, _to_recompute, _wrapped_by("recompute"))

ORDER = (
    Transform("tensor", _slice, _to_slice, _sliced),
    Transform("convert", _convert, _to_convert, _converted),  # which needs to know how weights are cut
    Transform("double", _double, _to_double, _doubled),  # inside recomputation, which repeats it
    Transform("freeze", _freeze, _to_freeze, _frozen),  # after tensor, which creates trainable parameters
    replace(RECOMPUTE, apply=_recompute_inside),
    Transform("compile", _compile, _to_compile, _wrapped_by("compile")),  # around recompute, see recompute.py
    Transform("local", _localize, _to_localize, _wrapped_by("local")),
    Transform("shard", _shard, _to_shard, _sharded),
    Transform("materialize", _materialize, _to_materialize, _materialized),
)
