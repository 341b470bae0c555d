"""What cannot run, as tables of rules: the degrees, and what engine, schedule and model make of them and of
the batch, whose own rules are in batch_rules.py.

A rule that does not hold is a refusal: section.field, the value, what is wrong, what is allowed, what to try.
The first one counts; a table is evaluated row by row, so that a row may rely on those above it. Nothing here
changes a value that the user gave.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from hybridtrain.errors import refusal
from hybridtrain.plan.schedules import LOOPED, SINGLE, SPLIT_BACKWARD, V, micro_batches, stages_per_rank
from hybridtrain.types import Capabilities, ModelFacts

if TYPE_CHECKING:
    from hybridtrain.config import schema
    from hybridtrain.plan.batch import BatchPlan
    from hybridtrain.plan.layout import ParallelLayout


class Rule(NamedTuple):
    """What must hold, and the four parts of the refusal if it does not."""

    field: str
    value: object
    holds: bool
    problem: str
    allowed: str
    instead: str


@dataclass(frozen=True)
class _Case:
    """What is to run."""

    parallel: schema.ParallelConfig
    layout: ParallelLayout
    plan: BatchPlan
    precision: str
    facts: ModelFacts
    capabilities: Capabilities


def require(rules: Iterable[Rule]) -> None:
    """Refuse by the first rule that does not hold (raises UserError)."""
    for rule in rules:
        if not rule.holds:
            raise refusal(rule.field, rule.value, rule.problem, allowed=rule.allowed, instead=rule.instead)


def check(
    parallel: schema.ParallelConfig,
    *,
    layout: ParallelLayout,
    plan: BatchPlan,
    precision: str,
    facts: ModelFacts,
    capabilities: Capabilities,
) -> None:
    """Refuse what cannot run (raises UserError)."""
    case = _Case(parallel, layout, plan, precision, facts, capabilities)
    for table in (
        _of_model,
        _of_engine,
        _of_engine_together,
        _of_zero,
        _of_pipeline,
        _of_tensor,
        _of_positions,
    ):
        require(table(case))


def processes(count: int) -> str:
    """The number with its noun, for messages: 1 process, 2 processes."""
    return f"{count} process{'' if count == 1 else 'es'}"


def of_degrees(degrees: Mapping[str, int], *, world_size: int) -> Iterator[Rule]:
    """Degrees of the axes, one of which may be -1: what the world size leaves."""
    yield Rule(
        "WORLD_SIZE",
        world_size,
        world_size >= 1,
        "no number of processes",
        "1 or more",
        "unset WORLD_SIZE, or start with torchrun",
    )
    cp = degrees["cp"]
    yield Rule(
        "parallel.cp",
        cp,
        cp in (1, -1),
        "context parallelism: the engine does not run this axis yet",
        "1",
        "parallel.cp=1",
    )
    for axis, degree in degrees.items():
        yield Rule(
            f"parallel.{axis}",
            degree,
            degree >= 1 or degree == -1,
            "not a degree",
            "1 or more, or -1 for one axis",
            f"parallel.{axis}=1",
        )
    first, second, *_ = [*(axis for axis, degree in degrees.items() if degree == -1), "", ""]
    problem = f"parallel.{first} is -1 too, so the degrees are not determined"
    yield Rule(f"parallel.{second}", -1, not second, problem, "-1 for one axis only", f"parallel.{second}=1")
    fixed = math.prod(degree for degree in degrees.values() if degree != -1)
    fits = world_size % fixed == 0 if first else world_size == fixed
    named = " x ".join(f"{axis}={degree}" for axis, degree in degrees.items() if degree != 1) or "single"
    started = f"{world_size} {'was' if world_size == 1 else 'were'} started"
    problem = f"these degrees take {'a multiple of ' if first else ''}{processes(fixed)}, but {started}"
    instead = f"hybridtrain train --nproc {fixed} ..., torchrun --nproc-per-node {fixed}, or other degrees"
    yield Rule("parallel", named, fits, problem, f"degrees whose product is {world_size}", instead)


def _of_engine(case: _Case) -> Iterator[Rule]:
    engine, able, parallel = case.capabilities.engine, case.capabilities, case.parallel
    for axis, degree in case.layout.axes():
        problem = f"engine={engine} does not run this axis yet"
        yield Rule(
            f"parallel.{axis}", degree, degree == 1 or axis in able.axes, problem, "1", f"parallel.{axis}=1"
        )
    wanted: list[tuple[str, object, frozenset]] = [
        ("parallel.zero_stage", parallel.zero_stage, able.zero_stages),
        ("parallel.schedule", parallel.schedule, able.schedules),
        ("precision.kind", case.precision, able.precisions),
    ]
    for field, first in case.plan.growing.items():
        problem, instead = f"engine={engine} has one size of batch", f"engine=torch, or {field}=0"
        yield Rule(field, first, able.growing_batches, problem, "0", instead)
    other = "" if engine.startswith("torch") else "engine=torch, or "
    for field, value, allowed in wanted:
        names = sorted(map(str, allowed))
        yield Rule(
            field,
            value,
            value in allowed,
            f"engine={engine} does not run it",
            ", ".join(names),
            f"{other}{field}={names[0]}",
        )


def _of_model(case: _Case) -> Iterator[Rule]:
    """Axes that the model's analysis (analysis/) has not shown to be exact."""
    for axis, degree in case.layout.axes():
        why = case.facts.refused.get(axis, "")
        problem = f"a {case.facts.model_type} model cannot be run so: {why}"
        instead = f"parallel.{axis}=1" + (", or parallel.allow_replicated=true" if axis == "tp" else "")
        yield Rule(f"parallel.{axis}", degree, degree == 1 or not why, problem, "1", instead)


def _of_engine_together(case: _Case) -> Iterator[Rule]:
    """Options that this engine supports separately but not in combination."""
    layout, parallel, able, kv = case.layout, case.parallel, case.capabilities, case.facts.kv_heads
    engine, stages, zero = f"engine={able.engine}", able.pipelined_zero_stages, parallel.zero_stage
    problem, allowed = (
        f"{engine} has no pipeline (pp={layout.pp}) with it",
        f"{', '.join(map(str, sorted(stages)))} with pp > 1",
    )
    yield Rule(
        "parallel.zero_stage",
        zero,
        layout.pp == 1 or zero in stages,
        problem,
        allowed,
        "engine=torch, or parallel.zero_stage=1",
    )
    replicas, instead = layout.dp_replicate, "engine=torch, or parallel.dp_replicate=1"
    problem = f"{engine} does not replicate groups of sharded copies (dp_shard={layout.dp_shard})"
    holds = replicas == 1 or layout.dp_shard == 1 or able.hybrid_sharding
    yield Rule("parallel.dp_replicate", replicas, holds, problem, "1 with dp_shard > 1", instead)
    wanted = parallel.sequence_parallel == "true"
    holds = layout.tp == 1 or not wanted or able.sequence_parallel
    problem, instead = (
        f"{engine} keeps whole sequences on every tp rank",
        "parallel.sequence_parallel=false, or engine=torch",
    )
    yield Rule("parallel.sequence_parallel", "true", holds, problem, "auto, false", instead)
    problem = f"{engine} does not share a key/value head among ranks"
    yield Rule(
        "parallel.tp",
        layout.tp,
        layout.tp <= kv or able.repeated_heads,
        problem,
        f"up to {kv}",
        f"engine=torch, or parallel.tp={kv}",
    )


def _of_zero(case: _Case) -> Iterator[Rule]:
    zero, shard = case.parallel.zero_stage, case.layout.dp_shard
    problem = f"dp_shard={shard} shards something, and stage 0 shards nothing"
    instead = "parallel.zero_stage=1, or parallel.dp_replicate instead of parallel.dp_shard"
    yield Rule(
        "parallel.zero_stage", 0, zero > 0 or shard == 1, problem, "1, 2 or 3 with dp_shard > 1", instead
    )
    holds = zero == 0 or shard > 1 or case.parallel.dp_shard == -1
    instead = "parallel.dp_shard=-1 parallel.dp_replicate=1, or parallel.zero_stage=0"
    yield Rule(
        "parallel.zero_stage",
        zero,
        holds,
        "there is nothing to shard over with dp_shard=1",
        "0 with dp_shard=1",
        instead,
    )


def _of_pipeline(case: _Case) -> Iterator[Rule]:
    schedule, pp, virtual = case.parallel.schedule, case.layout.pp, case.parallel.virtual_stages
    if pp == 1:
        yield from _of_cut(case, stages=1)
        return
    field = "parallel.virtual_stages"
    yield Rule(
        field,
        virtual,
        schedule not in SINGLE or virtual in (0, 1),
        f"{schedule} has one stage per rank",
        "0 or 1",
        "parallel.schedule=interleaved_1f1b",
    )
    yield Rule(
        field,
        virtual,
        schedule not in V or virtual in (0, 2),
        f"{schedule} has exactly two stages per rank",
        "0 or 2",
        f"{field}=2",
    )
    holds = schedule not in LOOPED or virtual == 0 or virtual >= 2
    yield Rule(
        field, virtual, holds, f"{schedule} wants several stages per rank", "0 (= 2), 2 or more", f"{field}=2"
    )
    yield from _of_micro_batches(case)
    stages, layers = pp * stages_per_rank(case.parallel), case.facts.layers
    problem = f"{stages} stages ({pp} ranks x {stages // pp} each) but the model has {layers} layers"
    yield Rule(
        "parallel.pp",
        pp,
        layers >= stages,
        problem,
        f"at most {layers} stages",
        "fewer stages, or parallel.schedule=1f1b (one stage per rank)",
    )
    yield from _of_cut(case, stages=stages)
    problem = (
        f"{schedule} splits the backward pass; "
        "with gradients reduced per micro-batch torch gives wrong gradients"
    )
    allowed, zero = "0 or 1 with " + ", ".join(SPLIT_BACKWARD), case.parallel.zero_stage
    holds = schedule not in SPLIT_BACKWARD or zero < 2
    yield Rule(
        "parallel.zero_stage",
        zero,
        holds,
        problem,
        allowed,
        "parallel.zero_stage=1, or parallel.schedule=1f1b",
    )
    from hybridtrain.plan import cuts  # it takes Rule from here

    yield from cuts.rules(case.parallel, layout=case.layout, facts=case.facts, capabilities=case.capabilities)


def _of_cut(case: _Case, *, stages: int) -> Iterator[Rule]:
    """The layers at which stages begin, if they are given."""
    cut, layers = case.parallel.cut, case.facts.layers
    if not cut:
        return
    number = f"{stages} stages begin at {stages - 1}" if stages > 1 else "with pp=1 there is one stage"
    allowed = f"{stages - 1} ascending, from 1 to {layers - 1}" if stages > 1 else "[]"
    for holds, problem in (
        (len(cut) == stages - 1, f"it names {len(cut)} layers, but after layer 0 {number}"),
        (len(set(cut)) == len(cut), "of two stages that begin at the same layer, one is empty"),
        (cut == sorted(cut), "the layers are not in ascending order"),
        (min(cut) > 0, "the first stage, which begins at layer 0, would be empty"),
        (max(cut) < layers, f"the model has {layers} layers, 0 to {layers - 1}"),
    ):
        yield Rule("parallel.cut", cut, holds, problem, allowed, "parallel.cut=[], which balances the stages")


def _of_micro_batches(case: _Case) -> Iterator[Rule]:
    plan, dp, accum = case.plan, case.layout.dp, case.plan.grad_accum
    stages = case.layout.pp * stages_per_rank(case.parallel)
    holds, words = micro_batches(case.parallel.schedule, pp=case.layout.pp, stages=stages)
    for rows in plan.ramp.values if plan.ramp else ():
        number = rows // (plan.micro_batch_size * dp)
        problem = (
            f"at {rows} rows each of {dp} data ranks has {number} micro-batches; "
            f"{case.parallel.schedule} wants {words}"
        )
        instead = (
            "a larger batch.ramp_start and batch.ramp_increment, "
            "a smaller batch.micro_batch_size, or batch.ramp_start=0"
        )
        yield Rule(
            "batch.ramp_start",
            plan.first_rows,
            holds(number),
            problem,
            f"micro-batches: {words}",
            instead,
        )
    wanted = next(n for n in range(accum, accum + 4 * stages) if holds(n))
    given = f"gives {accum} micro-batches of {plan.micro_batch_size} rows to each of {dp} data ranks"
    instead = f"batch.global_batch_size={wanted * plan.micro_batch_size * dp}" + (
        " or a smaller batch.micro_batch_size" if plan.micro_batch_size > 1 else ""
    )
    problem, allowed = (
        f"{given}; {case.parallel.schedule} wants {words}",
        f"micro-batches for each data rank: {words}",
    )
    yield Rule("batch.global_batch_size", plan.global_batch_size, holds(accum), problem, allowed, instead)


def even_shares(facts: ModelFacts, *, tp: int) -> Rule:
    """Heads and MLP of a model whose config.json tells how it is cut, for `tp` ranks."""
    heads, kv = facts.heads, facts.kv_heads
    degrees = [
        n
        for n in range(1, heads + 1)
        if heads % n == 0 and (kv % n == 0 or n % kv == 0) and facts.ffn % n == 0
    ]
    problem = (
        f"{heads} attention heads, {kv} key/value heads and an MLP of {facts.ffn} cannot be shared out evenly"
    )
    # A model that was analysed at this degree is cut as far as it can be (analysis/slices.py).
    holds = tp in degrees or facts.sliced is not None
    instead = f"parallel.tp={max(n for n in degrees if n <= tp)}"
    return Rule("parallel.tp", tp, holds, problem, ", ".join(map(str, degrees)), instead)


def _of_tensor(case: _Case) -> Iterator[Rule]:
    tp, facts, seq_len = case.layout.tp, case.facts, case.plan.seq_len
    if tp == 1:
        return
    yield even_shares(facts, tp=tp)
    blocks = facts.row_blocks
    yield Rule(
        "parallel.tp",
        tp,
        blocks % tp == 0,
        "a block of frozen weights in nf4 would be on two ranks, which a weight's rows are cut for",
        ", ".join(str(n) for n in range(1, blocks + 1) if blocks % n == 0),
        "adapters.base_format=int8, or parallel.dp_shard in its place",
    )
    wanted = case.parallel.sequence_parallel == "true"
    yield Rule(
        "parallel.sequence_parallel",
        "true",
        not wanted or facts.sequence,
        f"a {facts.model_type} model does not compute the same with sequence parallelism",
        "auto, false",
        "parallel.sequence_parallel=false",
    )
    shortest = case.plan.first_length
    for field, value, instead in (
        ("data.seq_len", seq_len, f"data.seq_len={max(1, seq_len // tp) * tp}"),
        ("batch.seq_len_start", shortest, "a larger batch.seq_len_start"),
    ):
        problem = f"sequence parallel cuts rows into tp={tp} equal parts"
        instead = f"{instead}, or parallel.sequence_parallel=false"
        yield Rule(field, value, not wanted or value % tp == 0, problem, f"multiples of {tp}", instead)


def _of_positions(case: _Case) -> Iterator[Rule]:
    length, most = case.plan.seq_len, case.facts.max_positions
    instead = f"data.seq_len={most}, or model.config.max_position_embeddings={length}"
    yield Rule(
        "data.seq_len", length, length <= most, f"the model has {most} positions", f"up to {most}", instead
    )
