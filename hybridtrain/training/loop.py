"""The training loop. It depends on the Engine protocol, the data and the callbacks, not on layouts."""

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
from hybridtrain.training.recovery import Recovery
from hybridtrain.types import Engine, Progress


@dataclass
class StepCounter:
    """Steps done on this rank, updated by `train`; for failure reports."""

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
    recovery: Recovery,
    stop: Stop,
    watchdog: Watchdog,
    counter: StepCounter,
) -> Progress:
    """Run optimizer steps start.step .. total_steps - 1, with the callbacks after each.

    Returns early if `stop` is requested.
    """
    step, tokens_seen, scaled = start.step, start.tokens_seen, config.precision.kind == "fp16_mixed"
    check_finite = NonFiniteCheck(limit=config.train.max_nonfinite, scaled=scaled, new_run=start.step == 0)
    flags = engine.flags = Flags((*stop.flags, SAVED))
    with GarbageCollection() as garbage:
        while step < total_steps and not stop.reason:
            watchdog.beat()
            if reason := stop.reason_here():
                flags.raised.add(reason)
            lr = lr_at(step, peak=config.optim.lr, schedule=config.schedule, total_steps=total_steps)
            recovery.before_step()
            result = engine.train_step(loader.micro_batches(step), lr=lr)
            step, tokens_seen = step + 1, tokens_seen + plan.rows_at(step) * plan.seq_len
            counter.step = step
            counts = flags.read()
            info = StepInfo(
                step=step,
                last=step == total_steps,
                stopping=stop.agree(counts),
                tokens_seen=tokens_seen,
                lr=lr,
                result=result,
                flags=counts,
            )
            log_step = info.last or step % config.train.log_every == 0
            saves = info.stopping or (config.checkpoint.every > 0 and step % config.checkpoint.every == 0)
            if (back := recovery.after_step(info, wait=log_step or saves)) is not None:
                step, tokens_seen, counter.step = back.step, back.tokens_seen, back.step
                continue
            callbacks.after_step(info)
            with recovery.explained(info):
                check_finite(info, wait=log_step)
            garbage.after(step)
    return Progress(step, tokens_seen, start.fingerprints)


class GarbageCollection:
    """Collects Python's garbage at the same steps on all ranks, since every step waits
    for the slowest rank."""

    EVERY = 50

    def __init__(self) -> None:
        self.started, self.enabled = False, gc.isenabled()

    def after(self, step: int) -> None:
        """After the first step, freeze its objects and turn automatic collection off; then
        collect every EVERY steps.
        """
        if not self.started:
            self.started = True
            gc.collect(1)  # a full collection takes 1/6 s, and finds little after the start
            gc.freeze()
            gc.disable()
        elif step % self.EVERY == 0:
            gc.collect(1)

    def __enter__(self) -> GarbageCollection:
        return self

    def __exit__(self, *error: object) -> None:
        if self.started:
            gc.unfreeze()
            if self.enabled:
                gc.enable()


class NonFiniteCheck:
    """Ends a run whose gradients stay non-finite.

    Counts on the device, and reads the count only when the host waits anyway.
    """

    def __init__(self, *, limit: int, scaled: bool, new_run: bool):
        """`scaled`: with loss scaling. `new_run`: starts at step 0."""
        self.limit, self.scaled, self.new_run = limit, scaled, new_run
        self.steps = 0
        self.streak: torch.Tensor | None = None
        self.unread = 0

    def __call__(self, info: StepInfo, *, wait: bool) -> None:
        """Count a step. Reads the count if `wait`, or if it may have reached the limit. Raises UserError."""
        skipped = info.result.skipped
        self.streak = skipped.clone() if self.streak is None else (self.streak + 1) * skipped
        self.unread, self.steps = self.unread + 1, self.steps + 1
        if not (wait or self.unread >= self.limit):
            return
        self.unread = 0
        count = int(self.streak)
        untrained = info.last and self.new_run and count == self.steps
        if count >= self.limit or untrained:
            advice = (
                "precision=bf16_mixed, which has fp32's range and needs no loss scale, or a lower optim.lr"
                if self.scaled
                else "a lower optim.lr, optim.clip=1.0, a longer schedule.warmup_steps"
            )
            if count < self.limit:
                raise UserError(
                    f"train.steps={self.steps}: "
                    f"the gradients of all {count} steps were not finite, so no update was made\n"
                    f"  allowed: a run with at least one update\n  try:     {advice}"
                )
            raise UserError(
                f"train.max_nonfinite={self.limit}: "
                f"the gradients of {count} steps in a row, up to step {info.step}, were not finite "
                f"(loss {float(info.result.loss):.4g}); no update was made in them\n"
                f"  allowed: fewer than {self.limit} such steps in a row\n"
                f"  try:     {advice}; the last checkpoint is from before or within them"
            )
