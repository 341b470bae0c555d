"""Results of the measured times: medians, the paired ratio and its interval, the table, the JSON.

No torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridtrain.errors import refusal
from hybridtrain.runtime.files import finite

CONFIDENCE = 0.95
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16_mixed": 1e-3, "fp16_mixed": 1e-3, "bf16_pure": 3e-3}
"""Largest relative difference of the first losses, of the same weights and tokens. Autocast rounds in other
places than the engine."""


@dataclass(frozen=True)
class Timing:
    """Steps of one side: their times, losses and memory."""

    name: str
    processes: int
    threads: int
    """CPU threads of each process."""
    rounds: list[list[float]]
    """For each round the seconds of each step, of the slowest process."""
    data_s: list[float]
    """Seconds per round that the host waited for tokens, of the slowest process."""
    losses: list[float]
    """Of every step, warm-up included."""
    memory_gib: list[float]
    """Peak memory of each process."""
    memory_before_gib: list[float]
    """Peak memory of each process before its model was built."""

    @property
    def steps(self) -> list[float]:
        return [step for steps in self.rounds for step in steps]

    @property
    def step_s(self) -> float:
        """Median over all steps."""
        return statistics.median(self.steps)

    @property
    def data_share(self) -> float:
        """Share of the time that the host waited for tokens."""
        return sum(self.data_s) / sum(self.steps)


@dataclass(frozen=True)
class StepWork:
    """The work of one optimizer step."""

    tokens: int
    flops_per_token: float
    peak: float | None
    """Peak FLOP/s of one device; None if it is not known."""


@dataclass(frozen=True)
class Ratio:
    """Median of paired speed ratios, and an interval that contains the true
    median with probability `confidence`.
    """

    median: float
    low: float
    high: float
    confidence: float
    rounds: int


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Speed of `ours` relative to `theirs`, from one time per round and side; paired rounds
    are neighbors in time.

    The interval consists of order statistics, so it is valid for any distribution: the k-th smallest and k-th
    largest ratio, with the largest k for which the confidence, 1 - 2 P(Binomial(n, 1/2) < k), reaches 95 %.
    It takes 6 rounds or more.
    """
    ratios = sorted(their / our for our, their in zip(ours, theirs, strict=True))
    count = len(ratios)
    outside = [
        2 * sum(math.comb(count, below) for below in range(k)) / 2**count for k in range(1, count // 2 + 1)
    ]
    k = max((k for k, chance in enumerate(outside, 1) if chance <= 1 - CONFIDENCE), default=1)
    return Ratio(
        statistics.median(ratios),
        ratios[k - 1],
        ratios[count - k],
        1 - outside[k - 1] if outside else 0.0,
        count,
    )


def ratio_of(ours: Timing, theirs: Timing) -> Ratio:
    """`paired_ratio` of the medians of the rounds."""
    return paired_ratio(
        [statistics.median(steps) for steps in ours.rounds],
        [statistics.median(steps) for steps in theirs.rounds],
    )


def facts(timing: Timing, work: StepWork) -> dict[str, float | None]:
    """Speed and memory of one side."""
    tokens_per_s = work.tokens / timing.step_s
    quartiles = (
        statistics.quantiles(timing.steps, n=4, method="inclusive")
        if len(timing.steps) > 1
        else [timing.step_s] * 3
    )
    return {
        "step_s": timing.step_s,
        "step_s_25": quartiles[0],
        "step_s_75": quartiles[2],
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_per_device": tokens_per_s / timing.processes,
        "mfu": tokens_per_s / timing.processes * work.flops_per_token / work.peak if work.peak else None,
        "memory_gib_max": max(timing.memory_gib),
        "memory_gib_sum": sum(timing.memory_gib),
        "memory_gib_before": max(timing.memory_before_gib),
        "data_share": timing.data_share,
    }


def table(timings: Sequence[Timing], work: StepWork) -> str:
    """One line per side."""
    heads = ("", "step s", "(quartiles)", "tokens/s", "per device", "MFU", "peak GiB", "sum", "before")
    rows = [heads]
    for timing in timings:
        known = facts(timing, work)
        rows.append(
            (
                timing.name,
                f"{known['step_s']:.4f}",
                f"({known['step_s_25']:.4f} to {known['step_s_75']:.4f})",
                f"{known['tokens_per_s']:,.0f}",
                f"{known['tokens_per_s_per_device']:,.0f}",
                "-" if known["mfu"] is None else f"{known['mfu']:.1%}",
                f"{known['memory_gib_max']:.2f}",
                f"{known['memory_gib_sum']:.2f}",
                f"{known['memory_gib_before']:.2f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if at == 0 else f"{cell:>{width}}"
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


@dataclass(frozen=True)
class Agreement:
    """Whether both sides computed the same loss."""

    difference: float
    """Relative difference of the first losses."""
    tolerance: float
    holds: bool


def agreement(ours: Timing, theirs: Timing, *, precision: str) -> Agreement:
    """Compare the losses of the first step."""
    difference = abs(ours.losses[0] - theirs.losses[0]) / abs(theirs.losses[0])
    tolerance = LOSS_TOLERANCE[precision]
    return Agreement(difference, tolerance, difference <= tolerance)  # false for NaN


_NOISY = 1.25
"""Ratio of the upper to the lower quartile of the step times above which the machine counts as busy."""


def noise_warning(timings: Sequence[Timing]) -> list[str]:
    """A warning if step times vary much: other work on the machine does not slow one
    process and several alike.
    """
    wide = []
    for timing in timings:
        quarter = (
            statistics.quantiles(timing.steps, n=4, method="inclusive")
            if len(timing.steps) > 1
            else [timing.step_s] * 3
        )
        if quarter[2] > _NOISY * quarter[0]:
            wide.append(f"{timing.name} {quarter[0]:.4f} to {quarter[2]:.4f} s")
    if not wide:
        return []
    return [
        f"THE MACHINE WAS NOT QUIET: half of the steps lie in {', '.join(wide)}; "
        "other work on it does not slow both sides alike, so that ratio says little"
    ]


def summary_lines(timings: Sequence[Timing], *, precision: str, corpus: bool) -> list[str]:
    """The lines below the table."""
    lines = []
    if corpus:
        lines += [
            f"{timing.name}: {timing.data_share:.2%} of the time was spent waiting for tokens"
            for timing in timings
        ]
    if len(timings) == 2:
        ours, theirs = timings
        ratio, same = ratio_of(ours, theirs), agreement(ours, theirs, precision=precision)
        few = "" if ratio.confidence >= CONFIDENCE else "; 6 rounds or more make it 95 %"
        lines.append(
            f"{ratio.median:.3f} times as fast as the plain loop: median of {ratio.rounds} paired rounds, "
            f"{ratio.confidence:.0%} interval {ratio.low:.3f} to {ratio.high:.3f}{few}"
        )
        lines += noise_warning(timings)
        verdict = "the same work" if same.holds else "NOT THE SAME WORK"
        lines.append(
            f"{verdict}: first losses {ours.losses[0]:.6f} and {theirs.losses[0]:.6f}, "
            f"relative difference {same.difference:.1e}, at most {same.tolerance:.0e}; "
            f"after {len(ours.losses)} steps {ours.losses[-1]:.6f} and {theirs.losses[-1]:.6f}"
        )
    return lines


def document(
    timings: Sequence[Timing], *, work: StepWork, precision: str, facts_of_run: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of bench.out: `facts_of_run` (config, layout, machine, versions), and each side
    with all step times.
    """
    content = dict(facts_of_run) | {"work": dataclasses.asdict(work)}
    content["sides"] = {timing.name: facts(timing, work) | dataclasses.asdict(timing) for timing in timings}
    if len(timings) == 2:
        content["ratio"] = dataclasses.asdict(ratio_of(*timings))
        content["agreement"] = dataclasses.asdict(agreement(*timings, precision=precision))
    return content


def check_writable(out: str) -> None:
    """Refuse a path that cannot be written, before anything runs (raises UserError)."""
    path = Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        path.open("a").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise refusal(
            "bench.out",
            out,
            f"it cannot be written: {error.strerror}",
            allowed="a file in a folder that you can write",
            instead="bench.out=bench.json",
        ) from error


def write(out: str, content: Mapping[str, Any]) -> None:
    """Write the JSON; NaN and infinities become null."""
    Path(out).write_text(json.dumps(finite(content), indent=1, default=str) + "\n")
