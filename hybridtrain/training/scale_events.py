"""Changes of the loss scale as events of the run."""

# ruff: noqa: ARG002 - a callback has the arguments of its interface

from __future__ import annotations

import torch
import torch.distributed as dist

from hybridtrain.run.directory import RunDir
from hybridtrain.training.callbacks import Callback, Run, StepInfo

_FOLDED = 256


class ScaleEvents(Callback):
    """Writes an event for each change of the loss scale, at logged steps, when the host waits anyway."""

    def __init__(self, folder: RunDir):
        self.folder, self.first = folder, 0
        """`first`: the step of the first of the scales."""
        self.scales: list[torch.Tensor] = []
        """(scale, next scale) of each step since the last line, (steps, 2) each, on the device."""

    def on_every_step(self, run: Run, info: StepInfo) -> None:
        if not self.scales:
            self.first = info.step
        self.scales.append(torch.stack([info.result.loss_scale, info.result.next_scale])[None])
        if len(self.scales) >= _FOLDED:  # a device allocates 512 bytes for a number
            self.scales = [torch.cat(self.scales)]
        if info.row is None:
            return
        pairs, self.scales = torch.cat(self.scales).tolist(), []
        if dist.get_rank() == 0:
            for step, (before, after) in enumerate(pairs, start=self.first):
                if before != after:
                    self.folder.append_event(
                        "loss_scale", step=step, detail=f"{before:,.15g} to {after:,.15g}"
                    )

    def on_rollback(self, run: Run) -> None:
        kept = max(0, run.step + 1 - self.first)  # those after it are of steps that were undone
        self.scales = [torch.cat(self.scales)[:kept]] if self.scales and kept else []
