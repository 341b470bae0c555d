"""Memory that a layout needs per rank, known before anything is allocated. Plain arithmetic, no torch.

held   weights, their gradients, Adam's moments, master copies: exact, in bytes of this rank's shares
step   copies gathered in the compute dtype, gradients being added up, the head's gradient: what a step surely has besides

activations   what layers keep for the backward pass: measured on eager layers, an estimate elsewhere, so that it only warns
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hybridtrain.errors import refusal
from hybridtrain.plan.batch import BatchPlan
from hybridtrain.plan.layout import ParallelLayout, stage_layers
from hybridtrain.plan.notation import write
from hybridtrain.plan.schedules import stages_per_rank
from hybridtrain.runtime import log
from hybridtrain.types import ModelFacts

if TYPE_CHECKING:
    from hybridtrain.config.schema import Config, ParallelConfig

_log = log.get("memory")
GIB = 1024**3
_MOST_SHARDS = 1024
_UNLIMITED = 1 << 60


@dataclass(frozen=True)
class Need:
    """Bytes of the rank that needs most."""

    held: int
    step: int
    host: int
    """Moved to the host's memory by offloading on a GPU, and not in the others."""

    @property
    def total(self) -> int:
        return self.held + self.step


@dataclass(frozen=True)
class Widths:
    """Bytes of a number as it is stored and as it is computed with."""

    stored: int
    compute: int


def widths(precision: str) -> Widths:
    """Of a recipe of precision/policy.py."""
    return {"fp32": Widths(4, 4), "bf16_mixed": Widths(4, 2), "fp16_mixed": Widths(4, 2), "bf16_pure": Widths(2, 2)}[precision]


def parameters_of_stage(facts: ModelFacts, *, layers: int, first: bool, last: bool, tp: int) -> tuple[int, int]:
    """(all parameters of one tensor-parallel rank in a run of layers, those of its largest layer). Biases and norms count as sliced: below 0.1 %."""
    ends = facts.vocab + (0 if facts.tied else facts.outputs)  # rows of the embedding and of the head
    layer = (facts.parameters - facts.hidden * (1 + ends)) // facts.layers
    repeated = 2 * facts.hidden * facts.kv_heads * facts.head_dim if tp > facts.kv_heads else 0  # key and value projections, whole on every rank
    norms = 2 * facts.hidden if tp > 1 else 0
    per_layer = math.ceil((layer - repeated - norms) / tp) + repeated + norms
    embedding, head = (math.ceil(rows / tp) * facts.hidden for rows in (facts.vocab, facts.outputs))
    both = first and last and facts.tied
    return layers * per_layer + first * embedding + (last and not both) * head + last * facts.hidden, per_layer


def needs(config: Config, *, parallel: ParallelConfig, layout: ParallelLayout, plan: BatchPlan, facts: ModelFacts) -> Need:
    """Memory of the rank that needs the most."""
    per_rank, found = stages_per_rank(parallel), []
    cuts = stage_layers(facts.layers, layout.pp * per_rank)
    for rank in range(layout.pp):
        total = largest = 0
        for index in range(rank, len(cuts), layout.pp):
            whole, layer = parameters_of_stage(facts, layers=len(cuts[index]), first=index == 0, last=index == len(cuts) - 1, tp=layout.tp)
            total, largest = total + whole, max(largest, layer)
        head = 4 * math.ceil(facts.outputs / layout.tp) * facts.hidden * (rank == (len(cuts) - 1) % layout.pp)
        of = _of_deepspeed if config.engine.kind == "deepspeed" else _of_torch
        found.append(of(config, parallel=parallel, layout=layout, plan=plan, total=total, largest=largest, head=head))
    return max(found, key=lambda need: need.total)


def _of_torch(config: Config, *, parallel: ParallelConfig, layout: ParallelLayout, plan: BatchPlan, total: int, largest: int, head: int) -> Need:
    w, zero = widths(config.precision.kind), parallel.zero_stage
    share = math.ceil(total / layout.dp_shard)
    held = share * w.stored * (4 if config.optim.kind == "adamw" else 2)  # weight, gradient, two moments; what a registered optimizer keeps is not known
    wrapped = layout.dp > 1 or layout.tp > 1 or w.compute != w.stored or config.precision.kind == "bf16_pure"
    if not wrapped:
        return Need(held, head, 0)
    gathered = (largest if zero == 3 else total) * w.compute
    summed = total * 4 if zero < 2 and plan.grad_accum > 1 and w.compute != 4 else 0
    return Need(held, gathered + summed + head, 0)


def _of_deepspeed(
    config: Config,
    *,
    parallel: ParallelConfig,
    layout: ParallelLayout,
    plan: BatchPlan,  # noqa: ARG001
    total: int,
    largest: int,
    head: int,
) -> Need:
    """fp32 weights and moments in equal shares of the data ranks from stage 1 on, the model's own copy whole up to stage 2. On a GPU offloaded parts are not its."""
    zero, compute = max(1, parallel.zero_stage), widths(config.precision.kind).compute
    share = math.ceil(total / layout.dp)
    masters, copy = share * 12, (share if zero == 3 else total) * compute
    moved = masters * (config.engine.offload_optimizer == "cpu" and _on_gpu())
    moved += copy * (config.engine.offload_parameters == "cpu" and zero == 3 and _on_gpu())
    return Need(masters + copy + share * 4 - moved, head + (largest * compute if zero == 3 else 0), moved)


def activations(config: Config, *, layout: ParallelLayout, plan: BatchPlan, facts: ModelFacts) -> int:
    """About how many bytes the layers of the first stage keep for the backward pass: of each of the micro-batches in flight, and one layer recomputed."""
    compute, pp, tp = widths(config.precision.kind).compute, layout.pp, layout.tp
    hidden = facts.hidden // (tp if config.parallel.sequence_parallel else 1)
    attention, ffn = 2 * (facts.heads + facts.kv_heads) * facts.head_dim // tp, facts.ffn // tp
    layer = 4 * ffn + (4 if compute == 4 else 6) * hidden + 2 * facts.hidden + attention  # attention and MLP take the whole input
    if config.engine.compile:
        layer = layer * 2 // 3  # measured: inductor recomputes what is cheap
    kind = config.recompute.kind
    kept = {"none": layer, "selective": 2 * ffn + 2 * hidden + attention, "full": hidden}[kind]
    per_rank = stages_per_rank(config.parallel)
    layers = len(stage_layers(facts.layers, pp * per_rank)[0]) * per_rank
    flying = plan.grad_accum if pp > 1 and config.parallel.schedule == "gpipe" else min(pp, plan.grad_accum)
    return compute * plan.micro_batch_size * plan.seq_len * (kept * layers * flying + (layer if kind != "none" else 0))


def warn(config: Config, *, layout: ParallelLayout, plan: BatchPlan, facts: ModelFacts, available: int, place: str) -> None:
    """Say so where a step may need more than the `available` bytes of a rank."""
    need = needs(config, parallel=config.parallel, layout=layout, plan=plan, facts=facts).total
    extra = activations(config, layout=layout, plan=plan, facts=facts)
    if not config.engine.check_memory or need + extra <= available:
        return
    ways = [f"batch.micro_batch_size={plan.micro_batch_size // 2}"] if plan.micro_batch_size > 1 else []
    ways += [f"recompute={kind}" for kind in {"none": ["selective", "full"], "selective": ["full"], "full": []}[config.recompute.kind]]
    words = f"activations of about {extra / GIB:.1f} GiB come on top of {need / GIB:.1f} GiB for weights, gradients, optimizer state and their copies"
    _log.warning("memory    %s: there are %.1f GiB of %s for each rank%s", words, available / GIB, place, f"; {' or '.join(ways)} takes less" if ways else "")


def host_share() -> int:
    """Bytes of the host's memory for each of its ranks."""
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    return host_memory() // (int(here) if here.isdecimal() and int(here) else 1)


def host_memory() -> int:
    """Bytes that this process's host, or the container around it, has; a very large number where that is not told."""
    found = [_UNLIMITED]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(name).read_text().strip() if Path(name).is_file() else ""
        found += [int(text)] if text.isdecimal() else []
    return min(found)


def _on_gpu() -> bool:
    """Whether this machine has NVIDIA GPUs that processes may use (without asking torch)."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "all") not in ("", "-1") and any(Path("/dev").glob("nvidia[0-9]*"))


def check_host(config: Config, *, layout: ParallelLayout, plan: BatchPlan, facts: ModelFacts) -> None:
    """Refuse what the processes of this host surely cannot hold together in its memory: without GPUs everything, else what is offloaded. Raises UserError."""
    available = host_share()
    if not _on_gpu():
        check(config, layout=layout, plan=plan, facts=facts, available=available, place="host memory")
        return
    need = needs(config, parallel=config.parallel, layout=layout, plan=plan, facts=facts)
    if config.engine.check_memory and need.host > available:
        words = f"a rank offloads {need.host / GIB:.1f} GiB to the host's memory, of which there are {available / GIB:.1f} GiB for each rank"
        instead = "more data ranks, offloading less (engine.offload_optimizer, engine.offload_parameters), or engine.check_memory=false"
        raise refusal("parallel", write(config.parallel, layout), words, allowed=f"at most {available / GIB:.1f} GiB", instead=instead)


def check(config: Config, *, layout: ParallelLayout, plan: BatchPlan, facts: ModelFacts, available: int, place: str) -> None:
    """Refuse a layout that needs more than the `available` bytes of a rank. Raises UserError."""
    if not config.engine.check_memory:
        return
    need = needs(config, parallel=config.parallel, layout=layout, plan=plan, facts=facts)
    if need.total <= available:
        return
    words = (
        f"a rank needs {need.held / GIB:.1f} GiB for weights, gradients and optimizer state and {need.step / GIB:.1f} GiB more in a step, before activations"
    )
    words += f"; there are {available / GIB:.1f} GiB of {place} for each rank"
    fitting = list(_fitting(config, plan=plan, facts=facts, available=available))
    instead = f"{' or '.join(fitting) if fitting else 'a smaller model'}, or engine.check_memory=false"
    raise refusal("parallel", write(config.parallel, layout), words, allowed=f"at most {available / GIB:.1f} GiB", instead=instead)


def _fitting(config: Config, *, plan: BatchPlan, facts: ModelFacts, available: int) -> Iterator[str]:
    """With the fewest ranks that fit: fully sharded data parallelism, alone and with tensor parallelism within a node."""
    for tp in (1, 8):
        if tp > 1 and (facts.heads % tp or facts.ffn % tp or facts.kv_heads % tp):
            continue
        for shards in (2**power for power in range(1, int(math.log2(_MOST_SHARDS)) + 1)):
            parallel = replace(config.parallel, pp=1, dp_replicate=1, dp_shard=shards, tp=tp, zero_stage=3)
            layout = ParallelLayout(dp_replicate=1, dp_shard=shards, cp=1, tp=tp, pp=1)
            if needs(config, parallel=parallel, layout=layout, plan=plan, facts=facts).total <= available:
                yield f"{write(parallel, layout)} on {shards * tp} ranks with as much memory"
                break
