"""Timed steps, the same for both sides of a benchmark.

On a GPU the host never waits inside a round: an event is recorded after each step and read after the round.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from hybridtrain.config.schema import Config
from hybridtrain.data.blend import open_data
from hybridtrain.data.loader import Loader
from hybridtrain.data.synthetic import Synthetic, Tokens
from hybridtrain.plan.batch import BatchPlan
from hybridtrain.tasks.causal_lm import CausalLM
from hybridtrain.training import metrics
from hybridtrain.types import Batch

_MOST_OPS = 20


@dataclass(frozen=True)
class Round:
    """Consecutive steps of one process."""

    steps_s: list[float]
    data_s: float
    """Seconds that the host waited for tokens, in total."""
    losses: list[float]


@dataclass(frozen=True)
class ProfiledOp:
    """An operation (CPU) or a kernel (GPU), over all its calls in the profiled steps."""

    name: str
    calls: int
    seconds: float
    """Self time, without the operations that it calls."""
    share: float


@dataclass(frozen=True)
class Memory:
    """Memory of one process, in GiB."""

    peak_gib: float
    """On a GPU what torch allocated, on the CPU resident memory."""
    before_gib: float
    """Peak before the model was built: on the CPU this is the memory of libraries."""
    threads: int
    """CPU threads that torch computes with."""


class Side:
    """One side of the benchmark in one process."""

    def __init__(
        self,
        step: Callable[[list[Batch]], Tensor],
        *,
        tokens: Tokens,
        device: torch.device,
        before_gib: float,
    ) -> None:
        self._step, self._tokens, self._device, self._before_gib = step, tokens, device, before_gib
        self._done = 0

    def run(self, count: int) -> Round:
        """The next `count` steps."""
        losses: list[Tensor] = []
        data_s = 0.0
        clock = _clock(self._device)
        for step in range(self._done, self._done + count):
            began = time.perf_counter()
            batches = self._tokens.micro_batches(step)
            data_s += time.perf_counter() - began
            losses.append(self._step(batches))
            clock.mark()
        self._done += count
        return Round(clock.laps(), data_s, [float(loss) for loss in losses])

    def profile(self, count: int) -> list[ProfiledOp]:
        """Profile the next `count` steps: the operations with the longest self time, longest first."""
        cuda = self._device.type == "cuda"
        with torch.profiler.profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        ) as recorded:
            self.run(count)
        chosen = DeviceType.CUDA if cuda else DeviceType.CPU
        events = [
            event
            for event in recorded.key_averages()
            if event.device_type == chosen and not event.is_user_annotation
        ]
        seconds = lambda event: (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6  # noqa: E731
        total = sum(map(seconds, events)) or 1.0
        longest = sorted(events, key=seconds, reverse=True)[:_MOST_OPS]
        return [
            ProfiledOp(event.key, event.count, seconds(event), seconds(event) / total) for event in longest
        ]

    def memory(self) -> Memory:
        """The peak since the process started."""
        return Memory(metrics.max_memory_gib(self._device), self._before_gib, torch.get_num_threads())


class _HostClock:
    """Times by the host's clock: on the CPU a step is over when the call returns."""

    def __init__(self) -> None:
        self._marks = [time.perf_counter()]

    def mark(self) -> None:
        self._marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        """Seconds between marks."""
        return [later - earlier for earlier, later in zip(self._marks, self._marks[1:], strict=False)]


class _DeviceClock:
    """Times by events on the GPU's stream, which is idle at the first one."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self._marks: list[torch.cuda.Event] = []
        self.mark()

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def laps(self) -> list[float]:
        """Seconds between marks; waits for the GPU."""
        torch.cuda.synchronize()
        return [
            earlier.elapsed_time(later) / 1e3
            for earlier, later in zip(self._marks, self._marks[1:], strict=False)
        ]


def _clock(device: torch.device) -> _HostClock | _DeviceClock:
    return _DeviceClock() if device.type == "cuda" else _HostClock()


def tokens_of(
    config: Config, *, corpus: bool, vocab: int, plan: BatchPlan, dp_rank: int, dp_size: int
) -> Tokens:
    """Tokens of the corpus at `data.path`, or random ones from the seed."""
    task = CausalLM()
    if corpus:
        data = open_data(config.data, timeout_s=0)
        return Loader(
            data,
            plan=plan,
            dp_rank=dp_rank,
            dp_size=dp_size,
            seed=config.run.seed,
            vocab=vocab,
            collate=task.collate,
        )
    return Synthetic(
        vocab=vocab,
        plan=plan,
        dp_rank=dp_rank,
        dp_size=dp_size,
        seed=config.run.seed,
        labels=0,
        head="",
        collate=task.collate,
    )
