"""Adaptive precision in a run: decisions after sampled steps, as events."""

# ruff: noqa: ARG002 - a callback has the arguments of its interface

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from hybridtrain.parallel.monitor import Monitor
from hybridtrain.precision.adaptive import Controller
from hybridtrain.run.directory import RunDir
from hybridtrain.runtime import log
from hybridtrain.training.callbacks import Callback, Run, StepInfo, stored_state

_log = log.get("train")
STATE = "adaptive"
"""Name of the small state in a checkpoint: formats and counts of the layers."""


class Adapt(Callback):
    """After Numerics: every rank decides the same, from the same sample."""

    def __init__(self, controller: Controller, *, engine: Any, monitor: Monitor, folder: RunDir):
        self.controller, self.engine, self.monitor, self.folder = controller, engine, monitor, folder

    def on_start(self, run: Run) -> None:
        run.states[STATE] = self.controller.state
        self._adopt(run)

    def on_rollback(self, run: Run) -> None:
        self._adopt(run)

    def _adopt(self, run: Run) -> None:
        self.controller.adopt(stored_state(run.loaded, STATE))
        self.engine.change_formats(self.controller.formats())
        self.monitor.again = self.controller.again

    def on_every_step(self, run: Run, info: StepInfo) -> None:
        if info.numerics is None:
            return
        made = self.controller.decide(info.numerics)
        self.engine.change_formats({each.module: each.after for each in made})
        self.monitor.again = self.controller.again
        if dist.get_rank() == 0:
            for each in made:
                detail = f"{each.module}: {each.before} -> {each.after}, since {each.reason}"
                self.folder.append_event("precision", step=info.step, detail=detail)
                _log.info("step %d: %s", info.step, detail)
