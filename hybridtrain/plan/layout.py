"""Parallel layouts and batch plans: pure arithmetic, no torch, no process group.

    world = pp x dp_replicate x dp_shard x cp x tp          (tp varies fastest over ranks)

`resolve` and `plan_batch` turn intent into numbers; `check` refuses, before processes meet, what the engine, the
schedule or the model cannot do. Nothing here changes a value that the user gave.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybridtrain.errors import refusal
from hybridtrain.types import Capabilities, ModelFacts

if TYPE_CHECKING:
    from hybridtrain.config import schema

SCHEDULES_SINGLE = ("gpipe", "1f1b")
SCHEDULES_LOOPED = ("interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble")
SCHEDULES_V = ("zbv_zero_bubble", "dualpipev")
SCHEDULES = SCHEDULES_SINGLE + SCHEDULES_LOOPED + SCHEDULES_V
SPLIT_BACKWARD = ("interleaved_zero_bubble", "zbv_zero_bubble", "dualpipev")
AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class ParallelLayout:
    """Degrees of every axis. `str` gives the form that `parity` and file names use: pp2-dp_shard2-tp2."""

    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    pp: int

    def axes(self) -> tuple[tuple[str, int], ...]:
        return tuple((axis, getattr(self, axis)) for axis in AXES)

    def degree(self, axis: str) -> int:
        return dict(self.axes())[axis]

    @property
    def world_size(self) -> int:
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def dp(self) -> int:
        """Data ranks: how many different micro-batches are in flight at once."""
        return self.dp_replicate * self.dp_shard

    def coordinates(self, rank: int) -> dict[str, int]:
        """Coordinate of `rank` on each axis."""
        result = {}
        for axis, degree in reversed(self.axes()):
            rank, result[axis] = divmod(rank, degree)
        return result

    def __str__(self) -> str:
        return "-".join(f"{axis}{degree}" for axis, degree in self.axes() if degree > 1) or "single"


@dataclass(frozen=True)
class BatchPlan:
    """global_batch_size = micro_batch_size x dp x grad_accum. Under pp, grad_accum is the number of micro-batches."""

    micro_batch_size: int
    seq_len: int
    grad_accum: int
    global_batch_size: int

    @property
    def tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.global_batch_size * self.seq_len


def resolve(parallel: schema.ParallelConfig, *, world_size: int) -> ParallelLayout:
    """Fill in the one -1 and refuse degrees that do not multiply out to `world_size`."""
    if world_size < 1:
        raise refusal("WORLD_SIZE", world_size, "no number of processes", allowed="1 or more", instead="unset WORLD_SIZE, or start with torchrun")
    degrees = {axis: getattr(parallel, axis) for axis in AXES}
    if degrees["cp"] not in (1, -1):
        raise refusal("parallel.cp", degrees["cp"], "context parallelism: the engine does not run this axis yet", allowed="1", instead="parallel.cp=1")
    for axis, degree in degrees.items():
        if degree == 0 or degree < -1:
            raise refusal(f"parallel.{axis}", degree, "not a degree", allowed="1 or more, or -1 for one axis", instead=f"parallel.{axis}=1")
    open_axes = [axis for axis, degree in degrees.items() if degree == -1]
    if len(open_axes) > 1:
        raise refusal(
            f"parallel.{open_axes[1]}",
            -1,
            f"parallel.{open_axes[0]} is -1 too, so the degrees are not determined",
            allowed="-1 for one axis only",
            instead=f"parallel.{open_axes[1]}=1",
        )
    fixed = 1
    for degree in degrees.values():
        fixed *= degree if degree != -1 else 1
    if world_size % fixed or (not open_axes and fixed != world_size):
        named = " x ".join(f"{axis}={degree}" for axis, degree in degrees.items() if degree != 1)
        raise refusal(
            "parallel",
            named or "single",
            f"these degrees take {'a multiple of ' if open_axes else ''}{processes(fixed)}, but {world_size} {'was' if world_size == 1 else 'were'} started",
            allowed=f"degrees whose product is {world_size}",
            instead=f"hybridtrain train --nproc {fixed} ..., torchrun --nproc-per-node {fixed}, or other degrees",
        )
    if open_axes:
        degrees[open_axes[0]] = world_size // fixed
    return ParallelLayout(**degrees)


def processes(count: int) -> str:
    """The number of them, for a sentence."""
    return f"{count} process{'' if count == 1 else 'es'}"


def plan_batch(batch: schema.BatchConfig, *, layout: ParallelLayout, seq_len: int) -> BatchPlan:
    """Derive grad_accum, or refuse a global batch that does not divide."""
    for name in ("global_batch_size", "micro_batch_size"):
        if getattr(batch, name) < 1:
            raise refusal(f"batch.{name}", getattr(batch, name), "not a batch size", allowed="1 or more", instead=f"batch.{name}=1")
    if seq_len < 1:
        raise refusal("data.seq_len", seq_len, "not a length", allowed="1 or more", instead="data.seq_len=256")
    rows = batch.micro_batch_size * layout.dp
    accum, rest = divmod(batch.global_batch_size, rows)
    if rest or accum == 0:
        raise refusal(
            "batch.global_batch_size",
            batch.global_batch_size,
            f"not a multiple of micro_batch_size {batch.micro_batch_size} x {layout.dp} data ranks",
            allowed=f"multiples of {rows}",
            instead=f"batch.global_batch_size={max(1, accum) * rows}",
        )
    return BatchPlan(batch.micro_batch_size, seq_len, accum, batch.global_batch_size)


def stages_per_rank(parallel: schema.ParallelConfig) -> int:
    """Pipeline stages that each pipeline rank holds."""
    if parallel.schedule in SCHEDULES_SINGLE or parallel.pp == 1:
        return 1
    return parallel.virtual_stages or 2


def stage_layers(layers: int, stages: int) -> list[range]:
    """Cut `layers` into `stages` runs. The first `layers % stages` stages hold one more; embedding and head ride along.

    >>> stage_layers(5, 2)
    [range(0, 3), range(3, 5)]
    """
    base, extra = divmod(layers, stages)
    cuts = [0]
    for stage in range(stages):
        cuts.append(cuts[-1] + base + (stage < extra))
    return [range(a, b) for a, b in itertools.pairwise(cuts)]


def check(
    parallel: schema.ParallelConfig,
    *,
    layout: ParallelLayout,
    plan: BatchPlan,
    precision: str,
    facts: ModelFacts,
    capabilities: Capabilities,
) -> None:
    """Refuse what cannot run, with section.field, the value, what is allowed and what to try (raises UserError)."""
    _check_capabilities(parallel, layout, precision, capabilities)
    _check_combinations(parallel, layout, facts, capabilities)
    _check_zero(parallel, layout)
    if layout.pp > 1:
        _check_pipeline(parallel, layout, plan, facts)
    if layout.tp > 1:
        _check_tensor(parallel, layout, plan, facts)
    if plan.seq_len > facts.max_positions:
        raise refusal(
            "data.seq_len",
            plan.seq_len,
            f"the model has {facts.max_positions} positions",
            allowed=f"up to {facts.max_positions}",
            instead=f"data.seq_len={facts.max_positions}, or model.config.max_position_embeddings={plan.seq_len}",
        )


def _check_capabilities(parallel: schema.ParallelConfig, layout: ParallelLayout, precision: str, capabilities: Capabilities) -> None:
    engine = capabilities.engine
    for axis, degree in layout.axes():
        if degree > 1 and axis not in capabilities.axes:
            raise refusal(f"parallel.{axis}", degree, f"engine={engine} does not run this axis yet", allowed="1", instead=f"parallel.{axis}=1")
    wanted: list[tuple[str, object, frozenset]] = [
        ("parallel.zero_stage", parallel.zero_stage, capabilities.zero_stages),
        ("parallel.schedule", parallel.schedule, capabilities.schedules),
        ("precision.kind", precision, capabilities.precisions),
    ]
    for field, value, allowed in wanted:
        if value not in allowed:
            names = sorted(map(str, allowed))
            other = "" if engine.startswith("torch") else "engine=torch, or "
            raise refusal(field, value, f"engine={engine} does not run it", allowed=", ".join(names), instead=f"{other}{field}={names[0]}")


def _check_combinations(parallel: schema.ParallelConfig, layout: ParallelLayout, facts: ModelFacts, capabilities: Capabilities) -> None:
    """What the engine runs by itself but not together; another engine may."""
    engine, stages = f"engine={capabilities.engine}", capabilities.pipelined_zero_stages
    if layout.pp > 1 and parallel.zero_stage not in stages:
        names = ", ".join(map(str, sorted(stages)))
        problem = f"{engine} has no pipeline (pp={layout.pp}) with it"
        raise refusal("parallel.zero_stage", parallel.zero_stage, problem, allowed=f"{names} with pp > 1", instead="engine=torch, or parallel.zero_stage=1")
    if layout.dp_replicate > 1 and layout.dp_shard > 1 and not capabilities.hybrid_sharding:
        problem = f"{engine} does not replicate groups of sharded copies (dp_shard={layout.dp_shard})"
        raise refusal("parallel.dp_replicate", layout.dp_replicate, problem, allowed="1 with dp_shard > 1", instead="engine=torch, or parallel.dp_replicate=1")
    if layout.tp > 1 and parallel.sequence_parallel and not capabilities.sequence_parallel:
        problem = f"{engine} keeps whole sequences on every tp rank"
        raise refusal("parallel.sequence_parallel", True, problem, allowed="false", instead="parallel.sequence_parallel=false, or engine=torch")
    if layout.tp > facts.kv_heads and not capabilities.repeated_heads:
        problem = f"{engine} does not share a key/value head among ranks"
        raise refusal("parallel.tp", layout.tp, problem, allowed=f"up to {facts.kv_heads}", instead=f"engine=torch, or parallel.tp={facts.kv_heads}")


def _check_zero(parallel: schema.ParallelConfig, layout: ParallelLayout) -> None:
    zero = parallel.zero_stage
    if zero == 0 and layout.dp_shard > 1:
        raise refusal(
            "parallel.zero_stage",
            0,
            f"dp_shard={layout.dp_shard} shards something, and stage 0 shards nothing",
            allowed="1, 2 or 3 with dp_shard > 1",
            instead="parallel.zero_stage=1, or parallel.dp_replicate instead of parallel.dp_shard",
        )
    if zero > 0 and layout.dp_shard == 1 and parallel.dp_shard != -1:
        raise refusal(
            "parallel.zero_stage",
            zero,
            "dp_shard=1 leaves nobody to share with",
            allowed="0 with dp_shard=1",
            instead="parallel.dp_shard=-1 parallel.dp_replicate=1, or parallel.zero_stage=0",
        )


def _check_pipeline(parallel: schema.ParallelConfig, layout: ParallelLayout, plan: BatchPlan, facts: ModelFacts) -> None:
    schedule, pp = parallel.schedule, layout.pp
    _check_virtual_stages(parallel)
    _check_micro_batches(parallel, layout, plan)
    stages = pp * stages_per_rank(parallel)
    if facts.layers < stages:
        raise refusal(
            "parallel.pp",
            pp,
            f"{stages} stages ({pp} ranks x {stages // pp} each) but the model has {facts.layers} layers",
            allowed=f"at most {facts.layers} stages",
            instead="fewer stages, or parallel.schedule=1f1b (one stage per rank)",
        )
    if schedule in SPLIT_BACKWARD and parallel.zero_stage >= 2:
        raise refusal(
            "parallel.zero_stage",
            parallel.zero_stage,
            f"{schedule} splits the backward pass; with gradients reduced per micro-batch torch gives wrong gradients",
            allowed="0 or 1 with " + ", ".join(SPLIT_BACKWARD),
            instead="parallel.zero_stage=1, or parallel.schedule=1f1b",
        )


def _check_virtual_stages(parallel: schema.ParallelConfig) -> None:
    schedule, virtual = parallel.schedule, parallel.virtual_stages
    if schedule in SCHEDULES_SINGLE and virtual not in (0, 1):
        raise refusal("parallel.virtual_stages", virtual, f"{schedule} has one stage per rank", allowed="0 or 1", instead="parallel.schedule=interleaved_1f1b")
    if schedule in SCHEDULES_V and virtual not in (0, 2):
        raise refusal("parallel.virtual_stages", virtual, f"{schedule} has exactly two stages per rank", allowed="0 or 2", instead="parallel.virtual_stages=2")
    if schedule in SCHEDULES_LOOPED and (virtual < 0 or virtual == 1):
        raise refusal(
            "parallel.virtual_stages", virtual, f"{schedule} wants several stages per rank", allowed="0 (= 2), 2 or more", instead="parallel.virtual_stages=2"
        )


def _check_micro_batches(parallel: schema.ParallelConfig, layout: ParallelLayout, plan: BatchPlan) -> None:
    """The schedules' own rules on the number of micro-batches (read off torch.distributed.pipelining 2.13)."""
    schedule, pp, accum = parallel.schedule, layout.pp, plan.grad_accum
    stages = pp * stages_per_rank(parallel)
    rules: dict[str, tuple[Callable[[int], bool], str]] = {
        "1f1b": (lambda n: n >= pp, f"at least {pp}, one for each stage"),
        "gpipe": (lambda n: n >= pp, f"at least {pp}, one for each stage"),
        "looped_bfs": (lambda n: n >= pp, f"at least {pp}, one for each pipeline rank"),
        "interleaved_1f1b": (lambda n: n % pp == 0, f"a multiple of pp={pp}"),
        "interleaved_zero_bubble": (lambda n: n % pp == 0, f"a multiple of pp={pp}"),
        "zbv_zero_bubble": (lambda n: n >= pp, f"at least pp={pp}"),
        "dualpipev": (lambda n: n >= stages, f"at least {stages}, one for each stage"),
    }
    holds, words = rules[schedule]
    if not holds(accum):
        wanted = next(n for n in range(accum, accum + 4 * stages) if holds(n))
        rows = plan.micro_batch_size * layout.dp
        raise refusal(
            "batch.global_batch_size",
            plan.global_batch_size,
            f"gives {accum} micro-batches of {plan.micro_batch_size} rows to each of {layout.dp} data ranks; {schedule} wants {words}",
            allowed=f"micro-batches for each data rank: {words}",
            instead=f"batch.global_batch_size={wanted * rows}" + (" or a smaller batch.micro_batch_size" if plan.micro_batch_size > 1 else ""),
        )


def _check_tensor(parallel: schema.ParallelConfig, layout: ParallelLayout, plan: BatchPlan, facts: ModelFacts) -> None:
    tp = layout.tp
    degrees = [n for n in range(1, facts.heads + 1) if facts.heads % n == 0 and (facts.kv_heads % n == 0 or n % facts.kv_heads == 0) and facts.ffn % n == 0]
    if tp not in degrees:
        why = f"{facts.heads} attention heads, {facts.kv_heads} key/value heads and an MLP of {facts.ffn} cannot be shared out evenly"
        raise refusal("parallel.tp", tp, why, allowed=", ".join(map(str, degrees)), instead=f"parallel.tp={max(n for n in degrees if n <= tp)}")
    if parallel.sequence_parallel and plan.seq_len % tp:
        raise refusal(
            "data.seq_len",
            plan.seq_len,
            f"sequence parallel cuts rows into tp={tp} equal parts",
            allowed=f"multiples of {tp}",
            instead=f"data.seq_len={max(1, plan.seq_len // tp) * tp}, or parallel.sequence_parallel=false",
        )


def parse(text: str) -> dict[str, Any]:
    """Read the written form (`pp2-dp_shard2-tp2-zero3`, `pp2-zbv_zero_bubble`, `single`) into fields of the parallel section."""
    fields: dict[str, Any] = {"dp_replicate": 1, "zero_stage": None}
    for part in filter(None, text.strip().split("-")):
        name = part.rstrip("0123456789")
        number = part[len(name) :]
        if part in SCHEDULES:
            fields["schedule"] = part
        elif part == "nosp":
            fields["sequence_parallel"] = False
        elif name in _NUMBERED and number:
            fields[_NUMBERED[name]] = int(number)
        elif part != "single":
            raise refusal(
                "layout",
                text,
                f"'{part}' is no part of a layout",
                allowed="an axis and its degree (" + ", ".join(AXES) + "), zero0 to zero3, a schedule, v2 (virtual stages), nosp, or single",
                instead="pp2-dp_shard2-tp2-zero3",
            )
    if fields["zero_stage"] is None:
        fields["zero_stage"] = 1 if fields.get("dp_shard", 1) > 1 else 0
    return fields


_NUMBERED = {axis: axis for axis in AXES} | {"zero": "zero_stage", "v": "virtual_stages"}


def write(parallel: schema.ParallelConfig, layout: ParallelLayout) -> str:
    """The written form that `parse` reads, with what deviates from the defaults appended."""
    parts = [str(layout)]
    if layout.dp_shard > 1:
        parts.append(f"zero{parallel.zero_stage}")
    if layout.pp > 1 and parallel.schedule != "1f1b":
        parts.append(parallel.schedule)
    if layout.pp > 1 and parallel.virtual_stages > 2:
        parts.append(f"v{parallel.virtual_stages}")
    if layout.tp > 1 and not parallel.sequence_parallel:
        parts.append("nosp")
    return "-".join(parts)
