"""The training loop. It knows the Engine contract, the data and the callbacks, and nothing of layouts."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch

from hybridtrain.config.schema import Config
from hybridtrain.data.loader import Loader
from hybridtrain.errors import UserError
from hybridtrain.optim.schedule import lr_at
from hybridtrain.plan.batch import BatchPlan
from hybridtrain.runtime.flags import Flags
from hybridtrain.runtime.stop import Stop
from hybridtrain.runtime.watchdog import Watchdog
from hybridtrain.training.builtin import SAVED
from hybridtrain.training.callbacks import Callbacks, StepInfo
from hybridtrain.types import Engine, Progress


@dataclass
class Done:
    """Steps that are done, on this rank, while they are being done: what a report of a failure says."""

    step: int


def train(
    engine: Engine,
    *,
    config: Config,
    loader: Loader,
    plan: BatchPlan,
    start: Progress,
    total_steps: int,
    callbacks: Callbacks,
    stop: Stop,
    watchdog: Watchdog,
    done: Done,
) -> Progress:
    """Optimizer steps start.step .. total_steps - 1, the callbacks after each. Returns where the run stands: earlier if `stop` says so."""
    step, tokens_seen, scaled = start.step, start.tokens_seen, config.precision.kind == "fp16_mixed"
    watch = NonFinite(limit=config.train.max_nonfinite, scaled=scaled, first=start.step == 0)
    flags = engine.flags = Flags((*stop.flags, SAVED))
    with Collector() as collector:
        while step < total_steps and not stop.reason:
            watchdog.beat()
            if reason := stop.reason_here():
                flags.raised.add(reason)
            lr = lr_at(step, peak=config.optim.lr, schedule=config.schedule, total_steps=total_steps)
            result = engine.train_step(loader.micro_batches(step), lr=lr)
            step, tokens_seen = step + 1, tokens_seen + plan.rows_at(step) * plan.seq_len
            done.step = step
            seen = flags.read()
            info = StepInfo(step=step, last=step == total_steps, stopping=stop.agree(seen), tokens_seen=tokens_seen, lr=lr, result=result, flags=seen)
            callbacks.after_step(info)
            watch(info, check=info.last or step % config.train.log_every == 0)
            collector.after(step)
    return Progress(step, tokens_seen, start.fingerprints)


class Collector:
    """Python's garbage collection at the same steps on all ranks. By itself it comes at another time on each, and every step waits for the slowest."""

    EVERY = 50

    def __init__(self) -> None:
        self.began, self.enabled = False, gc.isenabled()

    def after(self, step: int) -> None:
        """Once the first step has made what stays, only what comes after it is looked through, every EVERY steps."""
        if not self.began:
            self.began = True
            gc.collect(1)  # not all: what a start leaves in cycles is small, and looking through everything takes a sixth of a second
            gc.freeze()
            gc.disable()
        elif step % self.EVERY == 0:
            gc.collect(1)

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, *error: object) -> None:
        if self.began:
            gc.unfreeze()
            if self.enabled:
                gc.enable()


class NonFinite:
    """Ends a run whose gradients stay non-finite. Counts on the device; reads the count when there is a reason to wait anyway."""

    def __init__(self, *, limit: int, scaled: bool, first: bool):
        self.limit, self.scaled, self.first = limit, scaled, first
        self.steps = 0
        self.streak: torch.Tensor | None = None
        self.unread = 0

    def __call__(self, info: StepInfo, *, check: bool) -> None:
        skipped = info.result.skipped
        self.streak = skipped.clone() if self.streak is None else (self.streak + 1) * skipped
        self.unread, self.steps = self.unread + 1, self.steps + 1
        if not (check or self.unread >= self.limit):
            return
        self.unread = 0
        count = int(self.streak)
        nothing = info.last and self.first and count == self.steps  # a whole run without one update has not trained
        if count >= self.limit or nothing:
            advice = (
                "precision=bf16_mixed, which has fp32's range and needs no loss scale, or a lower optim.lr"
                if self.scaled
                else "a lower optim.lr, optim.clip=1.0, a longer schedule.warmup_steps"
            )
            if count < self.limit:
                raise UserError(
                    f"train.steps={self.steps}: the gradients of all {count} steps were not finite, so nothing was trained\n"
                    f"  allowed: a run with at least one update\n  try:     {advice}"
                )
            raise UserError(
                f"train.max_nonfinite={self.limit}: the gradients of {count} steps in a row, up to step {info.step}, were not finite (loss {float(info.result.loss):.4g}); no update was made in them\n"
                f"  allowed: fewer than {self.limit} such steps in a row\n  try:     {advice}; the last checkpoint is from before or within them"
            )
