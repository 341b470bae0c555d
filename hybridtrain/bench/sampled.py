"""What a step sampled by the numerics monitor costs, beside steps that are not, in the same process."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from hybridtrain.bench.rounds import Side
    from hybridtrain.config.schema import BenchRoot
    from hybridtrain.types import Batch


@dataclass(frozen=True)
class Pair:
    """Seconds of a step, the median of a round, and of the sampled step after it."""

    plain_s: float
    sampled_s: float


class SampledStep:
    """The engine's step; with precision.monitor_every, also with the monitor, and all that it writes."""

    def __init__(self, config: BenchRoot, *, engine: Any):
        from hybridtrain.training.numerics import monitor_of

        self.engine, self.lr = engine, config.optim.lr
        self.monitor, self.sampling = monitor_of(engine, config.precision), False

    def __call__(self, batches: list[Batch]) -> Tensor:
        monitor = self.monitor if self.sampling else None
        with monitor.sampling(monitor.every) if monitor else contextlib.nullcontext():
            result = self.engine.train_step(batches, lr=self.lr)
        if monitor:
            sample = monitor.sample(result)
            json.dumps(sample.line())
            sample.aggregates()
        return result.loss

    def pairs(self, ours: Side, *, steps: int, rounds: int) -> list[Pair]:
        """Rounds of steps without the monitor and one with it; none without precision.monitor_every."""
        found = []
        for _ in range(rounds + 1 if self.monitor else 0):
            plain = statistics.median(ours.run(steps).steps_s)
            self.sampling = True
            found.append(Pair(plain, ours.run(1).steps_s[0]))
            self.sampling = False
        return found[1:]  # the first is warm-up


def slowest(ranks: Sequence[Sequence[Pair]]) -> list[Pair]:
    """The pairs of all ranks, of which each step waits for the slowest."""
    return [
        Pair(max(each.plain_s for each in same), max(each.sampled_s for each in same))
        for same in zip(*ranks, strict=True)
    ]


def line(pairs: Sequence[Pair], *, every: int) -> str:
    """The result, for the console."""
    ratio = statistics.median(each.sampled_s / each.plain_s for each in pairs)
    seconds = statistics.median(each.sampled_s for each in pairs)
    return (
        f"numerics monitor: a sampled step takes {ratio:.3f} times as long ({seconds:.4f} s); at "
        f"precision.monitor_every={every} training is {(ratio - 1) / every:.2%} slower ({len(pairs)} pairs)"
    )
