"""The command: build both sides, run them in turn, gather what each process measured, print the results."""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hybridtrain import engine as engines
from hybridtrain.bench import result, sampled
from hybridtrain.bench.result import StepWork, Timing
from hybridtrain.bench.sampled import Pair, SampledStep
from hybridtrain.config import precision_checks
from hybridtrain.config.schema import BenchRoot
from hybridtrain.data import blend as blends
from hybridtrain.data import compatibility
from hybridtrain.engine import Settled
from hybridtrain.errors import refusal
from hybridtrain.plan import flops, memory, notation, rules
from hybridtrain.plan.batch import plan_batch
from hybridtrain.plan.layout import ParallelLayout
from hybridtrain.precision import rules as formats
from hybridtrain.runtime import launch, log

if TYPE_CHECKING:
    import torch

    from hybridtrain.bench.plain import PlainProcess
    from hybridtrain.bench.rounds import Memory, ProfiledOp, Round, Side

_log = log.get("bench")
_PROFILED = 2
"""Steps that are profiled for bench.parts."""


def compare(config: BenchRoot) -> int:
    """Time steps of `config` in the launcher's processes and, in turn, of the plain loop.
    1: their losses differ.

    Raises UserError, before the rendezvous if the config cannot run, later if the plain loop does
    not fit in memory.
    """
    settled = engines.settle(config, world_size=launch.world_size())
    memory.check_host(config, layout=settled.layout, plan=settled.plan, facts=settled.facts)
    adapted = _checked_tokens(config, settled)
    if adapted is not config:
        config, settled = adapted, engines.settle(adapted, world_size=launch.world_size())
    if config.bench.out and log.rank() == 0:
        result.check_writable(config.bench.out)
    import torch

    from hybridtrain.parallel import mesh
    from hybridtrain.runtime import host
    from hybridtrain.training import agreement

    device = mesh.device()
    mesh.connect(device, timeout_s=config.engine.timeout_s)
    agreement.agree(config, fingerprints={})
    torch.manual_seed(config.run.seed)
    engine, step, ours = _ours(config, settled, device=device)
    group = engine.mesh.checkpoint_group  # not used otherwise here
    _log_lines(_opening(config, settled, device))
    with _plain(config, settled) as plain:
        rounds = _take_turns(config, ours, plain, group=group)
        parts = _profile(ours, plain, group=group) if config.bench.parts else {}
        pairs = step.pairs(ours, steps=config.bench.steps, rounds=config.bench.rounds)
        pairs = sampled.slowest(_all_gather(pairs))
        all_ranks = _all_gather((rounds["ours"], ours.memory()))
        timings = [
            _timing(
                f"hybridtrain {notation.write(config.parallel, settled.layout)}",
                [rounds for rounds, _ in all_ranks],
                [m for _, m in all_ranks],
            )
        ]
        if plain:
            timings.append(_timing("plain loop", [rounds["plain"]], [plain.memory()]))
    hosts = host.gather(device)
    code = 0
    if log.rank() == 0:
        code = _conclude(
            config,
            settled,
            timings,
            parts=parts,
            pairs=pairs,
            work=_work(settled, engine=engine, device=device),
            hosts=hosts,
        )
    engine.close()
    mesh.disconnect()
    return code


def _checked_tokens(config: BenchRoot, settled: Settled) -> BenchRoot:
    """The config, with the vocabulary of the corpus that is to be read (raises UserError for one that cannot
    be, and for a batch that grows)."""
    precision_checks.check_fixed(config.precision, command="bench")
    for field, first in settled.plan.growing.items():
        problem, instead = "bench times steps of the full size", f"bench with {field}=0"
        raise refusal(field, first, problem, allowed="0", instead=instead)
    if not config.bench.corpus:
        return config
    data = blends.open_data(config.data, timeout_s=config.engine.timeout_s)
    adapted = compatibility.adapt_model(config, data, facts=settled.facts)
    if adapted is config:
        compatibility.check_vocab(data, vocab=settled.facts.vocab)
    compatibility.check_train_rows(data, seq_len=settled.plan.seq_len)
    return adapted


def _ours(config: BenchRoot, settled: Settled, *, device: torch.device) -> tuple[Any, SampledStep, Side]:
    """The engine, its step, and the timed side that calls it."""
    from hybridtrain.bench.rounds import Side, tokens_of
    from hybridtrain.training import metrics

    before_gib = metrics.max_memory_gib(device)
    engine = engines.build(config, layout=settled.layout, plan=settled.plan, device=device)
    tokens = tokens_of(
        config,
        corpus=config.bench.corpus,
        vocab=settled.facts.vocab,
        plan=settled.plan,
        dp_rank=engine.mesh.dp_rank,
        dp_size=settled.layout.dp,
    )
    step = SampledStep(config, engine=engine)
    return engine, step, Side(step, tokens=tokens, device=device, before_gib=before_gib)


@contextlib.contextmanager
def _plain(config: BenchRoot, settled: Settled) -> Iterator[PlainProcess | None]:
    """Yield, on rank 0 unless bench.plain=false, the process of the plain loop; else None."""
    if not config.bench.plain or log.rank() != 0:
        yield None
        return
    import torch

    from hybridtrain.bench.plain import PlainProcess, PlainSettings

    here = int(os.environ.get("LOCAL_WORLD_SIZE", settled.layout.world_size))
    plan = plan_batch(config.batch, layout=ParallelLayout(1, 1, 1, 1, 1), seq_len=config.data.seq_len)
    process = PlainProcess(
        PlainSettings(config, plan, settled.facts.vocab, threads=here * torch.get_num_threads())
    )
    try:
        yield process
    finally:
        process.close()


def _take_turns(
    config: BenchRoot, ours: Side, plain: PlainProcess | None, *, group: Any
) -> dict[str, list[Round]]:
    """Run warm-up and rounds.

    One side computes at a time; the first one alternates, so that drift of the machine cancels.
    """
    done: dict[str, list[Round]] = {"ours": [], "plain": []}
    counts = [config.bench.warmup, *[config.bench.steps] * config.bench.rounds]
    for number, count in enumerate(counts):
        for side in ("ours", "plain") if number % 2 == 0 else ("plain", "ours"):
            if side == "ours":
                done["ours"].append(ours.run(count))
            elif plain:
                done["plain"].append(plain.run(count))
            _wait(group)
        _log_lines(
            [
                _progress(
                    number, config.bench.rounds, {side: rounds[-1] for side, rounds in done.items() if rounds}
                )
            ]
        )
    return done


def _progress(number: int, rounds: int, last: dict[str, Round]) -> str:
    medians = {
        "hybridtrain" if side == "ours" else "plain loop": statistics.median(a_round.steps_s)
        for side, a_round in last.items()
    }
    times = ", ".join(f"{name} {seconds:.4f} s" for name, seconds in medians.items())
    ratio = (
        f", {medians['plain loop'] / medians['hybridtrain']:.3f} times as fast"
        if number and len(medians) == 2
        else ""
    )
    return f"{f'round {number}/{rounds}' if number else 'warm-up'}: {times} a step{ratio}"


def _profile(ours: Side, plain: PlainProcess | None, *, group: Any) -> dict[str, list[ProfiledOp]]:
    ops = {"hybridtrain": ours.profile(_PROFILED)}
    if plain:
        ops["plain loop"] = plain.profile(_PROFILED)
    _wait(group)
    return ops


def _wait(group: Any) -> None:
    """Barrier over `group` (gloo), so that waiting ranks use neither CPU nor GPU."""
    import torch.distributed as dist

    if group is not None:
        dist.barrier(group=group)


def _all_gather(value: Any) -> list[Any]:
    import torch.distributed as dist

    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _timing(name: str, ranks: Sequence[list[Round]], memory: Sequence[Memory]) -> Timing:
    """The timing of a side from the rounds of its processes.

    Of each step the slowest process counts; warm-up is left out.
    """
    by_round = list(zip(*ranks, strict=True))
    return Timing(
        name,
        processes=len(ranks),
        threads=memory[0].threads,
        rounds=[
            [max(steps) for steps in zip(*(a_round.steps_s for a_round in same), strict=True)]
            for same in by_round[1:]
        ],
        data_s=[max(a_round.data_s for a_round in same) for same in by_round[1:]],
        losses=[loss for a_round in ranks[0] for loss in a_round.losses],
        memory_gib=[of_rank.peak_gib for of_rank in memory],
        memory_before_gib=[of_rank.before_gib for of_rank in memory],
    )


def _work(settled: Settled, *, engine: Any, device: torch.device) -> StepWork:
    from hybridtrain.training import metrics

    per_token = flops.flops_per_token(settled.facts, seq_len=settled.plan.seq_len)
    return StepWork(
        settled.plan.tokens, per_token, metrics.peak_flops(device, dtype=engine.precision.compute)
    )


def _opening(config: BenchRoot, settled: Settled, device: torch.device) -> list[str]:
    """The first lines of the output: what is timed and compared."""
    plan, bench = settled.plan, config.bench
    tokens = (
        f"the corpus at {config.data.path}"
        if bench.corpus
        else f"random tokens from run.seed={config.run.seed}"
    )
    compiled = f", compiled per layer by {config.engine.compile_backend}" if config.engine.compile else ""
    lines = [
        (
            f"{settled.facts.model_type} with {settled.facts.parameters:,} parameters, "
            f"{_precision(config, device)}{compiled}, recompute {config.recompute.kind}"
        ),
        (
            f"{notation.write(config.parallel, settled.layout)} "
            f"on {rules.processes(settled.layout.world_size)} ({device.type}); "
            f"a step is {plan.global_batch_size} rows x {plan.seq_len} tokens "
            f"in micro-batches of {plan.micro_batch_size}, {tokens}"
        ),
        f"{bench.warmup} steps of warm-up, then {bench.rounds} rounds of {bench.steps} steps",
    ]
    if bench.plain:
        compiled = f", compiled by {bench.plain_compile}" if config.engine.compile else ""
        recompute = "full" if config.recompute.kind == "full" else "none"
        lines.append(
            "compared with: a plain PyTorch loop over Hugging Face's model in one process"
            f", {config.precision.kind}{compiled}, recompute {recompute}"
        )
    return lines


def _precision(config: BenchRoot, device: torch.device) -> str:
    """The engine's precision, with the formats that are not the device's own; the plain loop has its kind."""
    from hybridtrain.precision.device import is_emulated

    precision = config.precision
    names = sorted(formats.names_of(precision))
    emulated = [name for name in names if is_emulated(name, precision, device=device)]
    return formats.described(precision) + (f" ({', '.join(emulated)} emulated)" if emulated else "")


def _conclude(
    config: BenchRoot,
    settled: Settled,
    timings: list[Timing],
    *,
    parts: dict[str, list[ProfiledOp]],
    pairs: list[Pair],
    work: StepWork,
    hosts: list[Any],
) -> int:
    """Print the table and write the JSON; returns the exit code."""
    from hybridtrain.config.compose import public
    from hybridtrain.runtime import host

    lines = [
        "",
        result.table(timings, work),
        "",
        *result.summary_lines(timings, precision=config.precision.kind, corpus=config.bench.corpus),
    ]
    if pairs:
        lines += ["", sampled.line(pairs, every=config.precision.monitor_every)]
    for side, ops in parts.items():
        lines += ["", f"{side}: self time of {_PROFILED} profiled steps"]
        lines += [
            f"  {part.share:6.1%}  {part.seconds:8.4f} s  {part.calls:6}x  {part.name[:100]}" for part in ops
        ]
    _log_lines(lines)
    if config.bench.out:
        run = {
            "layout": notation.write(config.parallel, settled.layout),
            "world_size": settled.layout.world_size,
            "model": asdict(settled.facts),
            "machine": hosts,
            "versions": host.versions(),
            "config": public(config),
            "parts": {side: [asdict(part) for part in ops] for side, ops in parts.items()},
            "sampled": [asdict(pair) for pair in pairs],
        }
        result.write(
            config.bench.out,
            result.document(timings, work=work, precision=config.precision.kind, facts_of_run=run),
        )
        _log_lines([config.bench.out])
    same = len(timings) == 1 or result.agreement(*timings, precision=config.precision.kind).holds
    return 0 if same else 1


def _log_lines(lines: Sequence[str]) -> None:
    for line in lines:
        _log.info("%s", line)
