"""From a layout to this rank's parallel stages: the one place that knows the order of application.

build on meta, cut  ->  tensor parallel (and re-tie)  ->  freeze  ->  recompute, compile  ->  fully_shard
    ->  to_empty  ->  settle shards, buffers anew
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hybridtrain.config.schema import EngineConfig, ParallelConfig
from hybridtrain.models.family import Family
from hybridtrain.models.init import reset_buffers
from hybridtrain.models.patterns import matches
from hybridtrain.models.stage import Stage
from hybridtrain.parallel.fsdp import apply_shard, settle_shards
from hybridtrain.parallel.mesh import Mesh
from hybridtrain.parallel.pipeline import stage_ids
from hybridtrain.parallel.recompute import apply_compile, apply_recompute
from hybridtrain.parallel.slicing import apply_tensor_parallel, settle_embedding
from hybridtrain.plan.layout import SPLIT_BACKWARD, stage_layers, stages_per_rank
from hybridtrain.precision.policy import PrecisionPolicy


@dataclass(frozen=True)
class Recipe:
    """All that shapes a stage besides the model: one object instead of eight arguments."""

    parallel: ParallelConfig
    engine: EngineConfig
    precision: PrecisionPolicy
    recompute: str
    freeze: list[str]


def build_stages(config: Any, *, family: Family, mesh: Mesh, recipe: Recipe) -> tuple[list[int], list[Stage]]:
    """This rank's stage numbers and stages, parallel, allocated, their weights not yet set."""
    pp, per_rank = mesh.layout.pp, stages_per_rank(recipe.parallel)
    cuts = stage_layers(config.num_hidden_layers, pp * per_rank)
    ids = stage_ids(mesh.coordinates["pp"], pp=pp, per_rank=per_rank, schedule=recipe.parallel.schedule)
    stages = []
    for index in ids:
        stage = Stage(config, family=family, layers=cuts[index], first=index == 0, last=index == len(cuts) - 1, loss_chunk=recipe.engine.loss_chunk)
        stages.append(_apply(stage, mesh=mesh, recipe=recipe))
    return ids, stages


def _apply(stage: Stage, *, mesh: Mesh, recipe: Recipe) -> Stage:
    stage.to(recipe.precision.param)
    apply_tensor_parallel(stage, mesh=mesh, sequence_parallel=recipe.parallel.sequence_parallel)
    freeze(stage, patterns=recipe.freeze)  # not earlier: tensor-parallel styles make parameters that require gradients
    _recompute_and_compile(stage, mesh=mesh, recipe=recipe)
    apply_shard(stage, mesh=mesh, zero_stage=recipe.parallel.zero_stage, precision=recipe.precision)
    stage.to_empty(device=mesh.device)
    stage.tie()  # to_empty, too, makes two of them where fully_shard has not wrapped the stage
    settle_shards(stage)
    reset_buffers(stage, device=mesh.device)
    return stage


def _recompute_and_compile(stage: Stage, *, mesh: Mesh, recipe: Recipe) -> None:
    """Compilation goes around recomputation, so that one graph decides what is kept.

    Not where whole layers are recomputed under tensor parallelism: there torch 2.13 cannot save what such a graph hands to its backward pass
    (a DeviceMesh). Nothing is lost: with `full` nothing of a layer is kept in either order.
    """
    kind, compiled = recipe.recompute, recipe.engine.compile
    inside = not (compiled and kind == "full" and mesh.layout.tp > 1)
    if inside:
        apply_recompute(stage, kind=kind, split_backward=recipe.parallel.schedule in SPLIT_BACKWARD and not compiled)
    if compiled:
        if mesh.layout.tp > 1:
            settle_embedding(stage)
        apply_compile(stage, backend=recipe.engine.compile_backend)
    if not inside:
        apply_recompute(stage, kind=kind, split_backward=False)


def freeze(stage: Stage, *, patterns: list[str]) -> None:
    """Stop training the parameters whose names match. A pattern that matches nothing here may match on another stage."""
    for name, parameter in stage.named_parameters():
        if matches(stage.owner(name), patterns):
            parameter.requires_grad_(False)
