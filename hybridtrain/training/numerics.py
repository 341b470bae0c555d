"""The numerics monitor in a run: numerics.jsonl, and samples for callbacks and trackers."""

# ruff: noqa: ARG002 - a callback has the arguments of its interface

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from hybridtrain.config.schema import PrecisionConfig
from hybridtrain.parallel.monitor import Monitor
from hybridtrain.run.directory import RunDir
from hybridtrain.run.trackers import Trackers
from hybridtrain.training.callbacks import Callback, Run, StepInfo


def monitor_of(engine: Any, settings: PrecisionConfig) -> Monitor | None:
    """The monitor that precision.monitor_every asks for (collective). Raises UserError."""
    if not settings.monitor_every:
        return None
    return Monitor(
        engine.monitored(),
        every=settings.monitor_every,
        patterns=settings.monitor_modules,
        precision=settings,
    )


class Numerics(Callback):
    """After a sampled step, before all other callbacks: the sample becomes `info.numerics`."""

    def __init__(self, monitor: Monitor, *, folder: RunDir, trackers: Trackers):
        self.monitor, self.folder, self.trackers = monitor, folder, trackers

    def on_every_step(self, run: Run, info: StepInfo) -> None:
        if self.monitor.step != info.step:
            return
        info.numerics = self.monitor.sample(info.result)
        if dist.get_rank() == 0:
            self.folder.append_numerics(info.numerics.line())
            self.trackers.log(info.numerics.aggregates(), info.step)

    def on_rollback(self, run: Run) -> None:
        self.monitor.step = 0  # what it has sampled is of a step that was undone
