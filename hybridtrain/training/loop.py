"""The training loop. It depends on the Engine protocol, the data and the callbacks, not on layouts."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from hybridtrain.config.schema import Config
from hybridtrain.data.loader import Loader
from hybridtrain.optim.schedule import lr_at
from hybridtrain.plan.batch import BatchPlan
from hybridtrain.runtime.flags import Flags
from hybridtrain.runtime.stop import Stop
from hybridtrain.runtime.watchdog import Watchdog
from hybridtrain.training.builtin import SAVED
from hybridtrain.training.callbacks import Callbacks, StepInfo
from hybridtrain.training.nonfinite import NonFiniteCheck
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
    sampling: Callable[[int], AbstractContextManager[None]],
    recovery: Recovery,
    stop: Stop,
    watchdog: Watchdog,
    counter: StepCounter,
) -> Progress:
    """Run optimizer steps start.step .. total_steps - 1, with the callbacks after each.

    `sampling`: entered around each step, with its number, from 1. Returns early if `stop` is requested.
    """
    step, tokens_seen = start.step, start.tokens_seen
    check_finite = NonFiniteCheck(config, new_run=start.step == 0)
    flags = engine.flags = Flags((*stop.flags, SAVED))
    with GarbageCollection() as garbage:
        while step < total_steps and not stop.reason:
            watchdog.beat()
            if reason := stop.reason_here():
                flags.raised.add(reason)
            lr = lr_at(step, peak=config.optim.lr, schedule=config.schedule, total_steps=total_steps)
            recovery.before_step()
            batches = loader.micro_batches(step)
            with sampling(step + 1):
                result = engine.train_step(batches, lr=lr)
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
