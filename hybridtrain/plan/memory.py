"""The memory that a layout needs per rank, computed before anything is allocated. No torch.

state         weights, gradients, Adam's moments, master weights: exact
step          gathered weights in the compute dtype, accumulated gradients, the head's gradient: a lower bound

activations   saved for the backward pass: measured for eager layers, else estimated; only for a warning
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridtrain.errors import refusal
from hybridtrain.plan import optimizer_states, stages
from hybridtrain.plan.batch import BatchPlan
from hybridtrain.plan.layout import ParallelLayout
from hybridtrain.plan.notation import write
from hybridtrain.plan.schedules import SINGLE
from hybridtrain.plan.tensor import sequence_parallel
from hybridtrain.runtime import log
from hybridtrain.types import ModelFacts

if TYPE_CHECKING:
    from hybridtrain.config.schema import Config, ParallelConfig

_log = log.get("memory")
GIB = 1024**3
_MAX_SHARDS = 1024
_UNLIMITED = 1 << 60


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a rank needs."""

    state: int
    step: int
    host: int
    """Offloaded from a GPU to the host's memory; not in the others."""

    @property
    def total(self) -> int:
        return self.state + self.step


@dataclass(frozen=True)
class Widths:
    """Bytes of a number in master weights and in computation."""

    stored: int
    compute: int


def widths(precision: str) -> Widths:
    """The widths of a precision.kind."""
    return {
        "fp64": Widths(8, 8),
        "fp32": Widths(4, 4),
        "tf32": Widths(4, 4),
        "bf16_mixed": Widths(4, 2),
        "fp16_mixed": Widths(4, 2),
        "bf16_pure": Widths(2, 2),
    }[precision]


def parameters_of_stage(facts: ModelFacts, *, layers: range, tp: int) -> tuple[int, int]:
    """(parameters of a stage on one tensor-parallel rank, those of its largest layer).

    Biases and small norms count as sharded, an error below 0.1 %.
    """
    first, last = layers.start == 0, layers.stop == facts.layers
    sizes = [_on_rank(facts, size, tp=tp) for size in facts.parameters_of_layers[layers.start : layers.stop]]
    embedding, head = (math.ceil(rows / tp) * facts.hidden for rows in (facts.vocab, facts.outputs))
    rows = facts.vocab * facts.hidden
    shared = sum(facts.shared.values())
    embeds = first or rows in facts.shared.values()
    shared -= rows if rows in facts.shared.values() else 0
    both = embeds and last and facts.tied
    ends = embeds * embedding + shared + first * (_others(facts) - shared) + last * facts.hidden
    return sum(sizes) + ends + (last and not both) * head, max(sizes)


def _on_rank(facts: ModelFacts, size: int, *, tp: int) -> int:
    """Of a layer with `size` parameters those that a tensor-parallel rank stores."""
    if facts.stored is not None:
        return math.ceil(size * (1 - facts.stored + facts.stored / tp))
    # Key and value projections with fewer heads than ranks are full on every rank.
    repeated = 2 * facts.hidden * facts.kv_heads * facts.head_dim if tp > facts.kv_heads else 0
    whole = repeated + (2 * facts.hidden if tp > 1 else 0)
    return math.ceil((size - whole) / tp) + whole


def _others(facts: ModelFacts) -> int:
    """Parameters outside layers, embedding, head and final norm, such as those of positions: they are used
    before the layers."""
    if not facts.layer_parameters:
        return 0
    ends = facts.vocab + (0 if facts.tied else facts.outputs)
    return facts.parameters - sum(facts.layer_parameters) - facts.hidden * (1 + ends)


def needs(
    config: Config, *, parallel: ParallelConfig, layout: ParallelLayout, plan: BatchPlan, facts: ModelFacts
) -> MemoryNeed:
    """Memory of the rank that needs the most."""
    of_ranks = []
    cut = stages.cut(config, parallel=parallel, pp=layout.pp, plan=plan, facts=facts)
    for numbers in cut.ranks:
        held = [cut.layers[index] for index in numbers]
        sizes = [parameters_of_stage(facts, layers=layers, tp=layout.tp) for layers in held]
        total, largest = sum(stage for stage, _ in sizes), max(layer for _, layer in sizes)
        last = len(cut.layers) - 1 in numbers
        head = 4 * math.ceil(facts.outputs / layout.tp) * facts.hidden * last
        frozen = 0
        if facts.adapters:  # counted as whole on every tensor-parallel rank: about half of them are
            layers = [layer for index in numbers for layer in cut.layers[index]]
            frozen = total * widths(config.precision.kind).compute
            frozen -= _saved(config, layers=layers, layout=layout, facts=facts)
            total, head = sum(facts.adapters[layer] for layer in layers), 0
        of_rank = _of_deepspeed if config.engine.kind == "deepspeed" else _of_torch
        run: dict[str, Any] = {"parallel": parallel, "layout": layout, "plan": plan}
        need = of_rank(config, **run, total=total, frozen=frozen, largest=largest, head=head)
        if not facts.adapters:  # of these, which are small, not counted
            factors = sum(
                optimizer_states.bytes_of_factors(config, facts=facts, layers=layers) for layers in held
            )
            update = optimizer_states.bytes_of_update(config, layout=layout, facts=facts, ends=held)
            need = replace(need, state=need.state + factors, step=max(need.step, update))
        of_ranks.append(need)
    return max(of_ranks, key=lambda need: need.total)


def _saved(config: Config, *, layers: Sequence[int], layout: ParallelLayout, facts: ModelFacts) -> int:
    """Bytes that codes of frozen weights save on a rank (adapters.base_format)."""
    width, saved = widths(config.precision.kind).compute, 0
    for layer in layers if facts.quantised else ():
        weights, codes, largest = facts.quantised[layer]
        part = _on_rank(facts, weights, tp=layout.tp) / weights if weights else 0
        saved += int(part * (weights * width - codes - largest * width))
    return saved


def _of_torch(
    config: Config,
    *,
    parallel: ParallelConfig,
    layout: ParallelLayout,
    plan: BatchPlan,
    total: int,
    frozen: int,
    largest: int,
    head: int,
) -> MemoryNeed:
    """`total`: trained parameters of the rank, `frozen`: bytes of those beside adapters, `largest`: of its
    largest layer; `head`: bytes of the head's gradient in fp32.
    """
    w, streams = widths(config.precision.kind), config.engine.offload_parameters == "cpu"
    zero = 3 if streams else parallel.zero_stage
    share = math.ceil(total / layout.dp_shard)
    weights = share * w.stored  # as much as their gradients
    # Compensation and moments; the state of a registered optimizer is unknown.
    moments = optimizer_states.bytes_of_moments(config, stored=w.stored)
    average = share * max(4, w.stored) * bool(config.optim.ema)
    rest = weights * optimizer_states.compensated(config) + math.ceil(share * moments) + average
    kept = math.ceil(frozen / layout.dp_shard)
    state, host = _places(config, weights=weights, rest=rest, frozen=kept)
    before = share * w.stored * bool(config.precision.monitor_every)  # a copy of the weights, at the update
    casts = w.compute != w.stored or config.precision.kind == "bf16_pure"
    if not (layout.dp > 1 or casts or streams):
        return MemoryNeed(state, max(head, before), host)
    gathered = largest * w.compute if zero == 3 else total * w.compute + frozen
    sums = total if zero < 2 else share * (w.stored == 2)  # in fp32
    accumulated = sums * 4 if plan.grad_accum > 1 and w.compute != 4 else 0
    return MemoryNeed(state, max(gathered + accumulated + head, before), host)


def _places(config: Config, *, weights: int, rest: int, frozen: int) -> tuple[int, int]:
    """(bytes on the device, offloaded to the host) of trained weights, as many bytes of gradients, the `rest`
    of the state, and frozen weights. On a CPU, the copies of the weights are in the same memory.
    """
    trained = 2 * weights + rest
    if config.engine.offload_parameters == "cpu":
        return (0, trained + frozen) if _on_gpu() else (trained + frozen, 0)
    if config.engine.offload_optimizer == "cpu":
        return (2 * weights + frozen, trained) if _on_gpu() else (trained + weights + frozen, 0)
    return trained + frozen, 0


def _of_deepspeed(
    config: Config,
    *,
    parallel: ParallelConfig,
    layout: ParallelLayout,
    plan: BatchPlan,  # noqa: ARG001
    total: int,
    frozen: int,  # noqa: ARG001 - it has no adapters
    largest: int,
    head: int,
) -> MemoryNeed:
    """DeepSpeed shards fp32 weights and moments from stage 1 on, the weights in the compute dtype in stage 3.

    See _of_torch.
    """
    zero, compute = max(1, parallel.zero_stage), widths(config.precision.kind).compute
    share = math.ceil(total / layout.dp)
    masters, copy = share * 12, (share if zero == 3 else total) * compute
    offloaded = masters * (config.engine.offload_optimizer == "cpu" and _on_gpu())
    offloaded += copy * (config.engine.offload_parameters == "cpu" and zero == 3 and _on_gpu())
    before = share * 4 * bool(config.precision.monitor_every)  # see _of_torch
    step = max(head + (largest * compute if zero == 3 else 0), before)
    return MemoryNeed(masters + copy + share * 4 - offloaded, step, offloaded)


def activations(config: Config, *, layout: ParallelLayout, plan: BatchPlan, facts: ModelFacts) -> int:
    """Approximate bytes of activations of the rank that holds most: of all micro-batches in flight, and
    of one recomputed layer.
    """
    compute, tp = widths(config.precision.kind).compute, layout.tp
    sequence = facts.sequence and sequence_parallel(config.parallel, plan=plan, tp=tp)
    hidden = facts.hidden // (tp if sequence and config.engine.kind == "torch" else 1)
    attention, ffn = 2 * (facts.heads + facts.kv_heads) * facts.head_dim // tp, facts.ffn // tp
    # Attention and MLP gather their input, so 2 x hidden is not divided by tp.
    layer = 4 * ffn + (4 if compute == 4 else 6) * hidden + 2 * facts.hidden + attention
    if config.engine.compile:
        layer = layer * 2 // 3  # measured: inductor recomputes cheap operations
    kind = config.recompute.kind
    layer += facts.adapter_values // tp  # about: outputs that are sums over ranks are whole
    saved = {"none": layer, "selective": 2 * ffn + 2 * hidden + attention, "full": hidden}[kind]
    held = _layers_held(config, layout=layout, plan=plan, facts=facts)
    return compute * plan.micro_batch_size * plan.seq_len * (saved * held + (layer if kind != "none" else 0))


def _layers_held(config: Config, *, layout: ParallelLayout, plan: BatchPlan, facts: ModelFacts) -> int:
    """Most layers of a rank times micro-batches in flight."""
    pp, schedule = layout.pp, config.parallel.schedule
    cut = stages.cut(config, parallel=config.parallel, pp=pp, plan=plan, facts=facts)
    held = []
    for rank, numbers in enumerate(cut.ranks):
        # With 1F1B, a rank has begun as many micro-batches as there are stages from its own on.
        begun = plan.grad_accum if schedule == "gpipe" and pp > 1 else pp - rank if schedule in SINGLE else pp
        held.append(sum(len(cut.layers[index]) for index in numbers) * min(begun, plan.grad_accum))
    return max(held)


def warn(
    config: Config, *, layout: ParallelLayout, plan: BatchPlan, facts: ModelFacts, available: int, place: str
) -> None:
    """Log a warning if a step may need more than the `available` bytes of a rank, with activations."""
    need = needs(config, parallel=config.parallel, layout=layout, plan=plan, facts=facts).total
    extra = activations(config, layout=layout, plan=plan, facts=facts)
    if not config.engine.check_memory or need + extra <= available:
        return
    ways = [f"batch.micro_batch_size={plan.micro_batch_size // 2}"] if plan.micro_batch_size > 1 else []
    ways += [
        f"recompute={kind}"
        for kind in {"none": ["selective", "full"], "selective": ["full"], "full": []}[config.recompute.kind]
    ]
    problem = (
        f"activations of about {extra / GIB:.1f} GiB come on top of {need / GIB:.1f} GiB for weights, "
        "gradients, optimizer state and their copies"
    )
    hint = f"; {' or '.join(ways)} takes less" if ways else ""
    _log.warning(
        "memory    %s: there are %.1f GiB of %s for each rank%s", problem, available / GIB, place, hint
    )


def host_share() -> int:
    """Bytes of host memory per rank of this host."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    return host_memory() // (int(ranks) if ranks.isdecimal() and int(ranks) else 1)


def host_memory() -> int:
    """Bytes of memory of this host or container; a very large number if unknown."""
    limits = [_UNLIMITED]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(name).read_text().strip() if Path(name).is_file() else ""
        limits += [int(text)] if text.isdecimal() else []
    return min(limits)


def _on_gpu() -> bool:
    """Whether this machine has NVIDIA GPUs that this process may use. Without torch."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "all") not in ("", "-1") and any(
        Path("/dev").glob("nvidia[0-9]*")
    )


def check_host(config: Config, *, layout: ParallelLayout, plan: BatchPlan, facts: ModelFacts) -> None:
    """Raise UserError if this host's memory is too small for its ranks: for everything, or with GPUs,
    for what is offloaded.
    """
    available = host_share()
    if not _on_gpu():
        check(config, layout=layout, plan=plan, facts=facts, available=available, place="host memory")
        return
    need = needs(config, parallel=config.parallel, layout=layout, plan=plan, facts=facts)
    if config.engine.check_memory and need.host > available:
        problem = (
            f"a rank offloads {need.host / GIB:.1f} GiB to the host's memory, "
            f"of which there are {available / GIB:.1f} GiB for each rank"
        )
        instead = (
            "more data ranks, offloading less (engine.offload_optimizer, "
            "engine.offload_parameters), or engine.check_memory=false"
        )
        raise refusal(
            "parallel",
            write(config.parallel, layout),
            problem,
            allowed=f"at most {available / GIB:.1f} GiB",
            instead=instead,
        )


def check(
    config: Config, *, layout: ParallelLayout, plan: BatchPlan, facts: ModelFacts, available: int, place: str
) -> None:
    """Raise UserError for a layout that needs more than the `available` bytes of a rank,
    without activations."""
    if not config.engine.check_memory:
        return
    need = needs(config, parallel=config.parallel, layout=layout, plan=plan, facts=facts)
    if need.total <= available:
        return
    problem = (
        f"a rank needs {need.state / GIB:.1f} GiB for weights, gradients and optimizer state "
        f"and {need.step / GIB:.1f} GiB more in a step, before activations"
    )
    problem += f"; there are {available / GIB:.1f} GiB of {place} for each rank"
    suggestions = list(_layouts_that_fit(config, plan=plan, facts=facts, available=available))
    instead = (
        f"{' or '.join(suggestions) if suggestions else 'a smaller model'}, or engine.check_memory=false"
    )
    raise refusal(
        "parallel",
        write(config.parallel, layout),
        problem,
        allowed=f"at most {available / GIB:.1f} GiB",
        instead=instead,
    )


def _layouts_that_fit(config: Config, *, plan: BatchPlan, facts: ModelFacts, available: int) -> Iterator[str]:
    """The smallest layouts that fit with fully sharded data parallelism, alone and with tp=8."""
    for tp in (1, 8):
        uneven = facts.heads % tp or facts.ffn % tp or facts.kv_heads % tp
        if tp > 1 and (uneven or "tp" in facts.refused):
            continue
        for shards in (2**power for power in range(1, int(math.log2(_MAX_SHARDS)) + 1)):
            parallel = replace(
                config.parallel, pp=1, cut=[], dp_replicate=1, dp_shard=shards, tp=tp, zero_stage=3
            )
            layout = ParallelLayout(dp_replicate=1, dp_shard=shards, cp=1, tp=tp, pp=1)
            if needs(config, parallel=parallel, layout=layout, plan=plan, facts=facts).total <= available:
                yield f"{write(parallel, layout)} on {shards * tp} ranks with as much memory"
                break
