"""A user's own code around the steps of a run.

    class Stopper(ht.Callback):
        def on_evaluate(self, run, metrics):
            if metrics["eval_loss"] < 2.0:
                run.stop("good enough")

Every rank calls every callback, in the order given, after the same steps: a callback may use torch.distributed. An
exception in it ends the run, and the error report names the rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from hybridtrain import registry
from hybridtrain.config.schema import Config
from hybridtrain.errors import refusal
from hybridtrain.runtime import log
from hybridtrain.runtime.stop import Stop
from hybridtrain.training.hooks import Moment
from hybridtrain.types import Engine

_log = log.get("train")


@dataclass
class Run:
    """The state of the run that is passed to callbacks."""

    config: Config
    dir: Path
    engine: Engine
    """For `weights()` and `modules()`, which under a layout of several ranks are this rank's share."""
    total_steps: int
    step: int
    """Optimizer steps done."""
    tokens_seen: int
    _stop: Stop

    def stop(self, reason: str) -> None:
        """End the run after the next step, with a checkpoint. One rank that asks is enough; `reason` goes into summary.json."""
        self._stop.ask(reason)


class Callback:
    """Methods that a run calls; override those that you need."""

    def on_start(self, run: Run) -> None:
        """Before the first step of this process: weights are loaded, a checkpoint's included."""

    def on_step(self, run: Run, metrics: Mapping[str, Any]) -> None:
        """After each logged step (train.log_every). `metrics`: the line of metrics.jsonl; speed and memory are this rank's, the rest is equal on all ranks."""

    def on_evaluate(self, run: Run, metrics: Mapping[str, float]) -> None:
        """After an evaluation (train.eval_every), before `on_step` of the same step. `metrics`: `eval_loss`, and what else the task evaluates."""

    def on_checkpoint(self, run: Run, path: Path) -> None:
        """A checkpoint is complete on disk; training may have continued in the meantime."""

    def on_end(self, run: Run, error: BaseException | None) -> None:
        """The last call. `error`: the exception that ended the run; None if it finished or was stopped."""


def registered(config: Config) -> tuple[Callback, ...]:
    """The callbacks that run.callbacks names: a class is made without arguments, a function is called with the config. Raises UserError for what is none."""
    result = []
    for name in config.run.callbacks:
        factory = registry.own("callback", name)
        assert factory is not None
        made = factory() if isinstance(factory, type) else factory(config)
        if not isinstance(made, Callback):
            problem, instead = f"its factory returned {type(made).__name__}", f'@ht.register("callback", "{name}") above a class that inherits ht.Callback'
            raise refusal("run.callbacks", f"[{name}]", problem, allowed="an ht.Callback", instead=instead)
        result.append(made)
    return tuple(result)


class Callbacks:
    """The hook that calls a run's callbacks; it stands behind the one that logs."""

    def __init__(self, callbacks: Sequence[Callback], run: Run):
        self.callbacks, self.run = callbacks, run

    def __enter__(self) -> Callbacks:
        for callback in self.callbacks:
            callback.on_start(self.run)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end(error)

    def __call__(self, moment: Moment) -> None:
        self.run.step, self.run.tokens_seen = moment.step, moment.tokens_seen
        if moment.row is None:
            return
        for callback in self.callbacks:
            if moment.extra:
                callback.on_evaluate(self.run, dict(moment.extra))
            callback.on_step(self.run, dict(moment.row))

    def saved(self, path: Path) -> None:
        for callback in self.callbacks:
            callback.on_checkpoint(self.run, path)

    def close(self) -> None:
        return  # `on_end` comes when all hooks are closed

    def _end(self, error: BaseException | None) -> None:
        """Tell every callback. After a failure none of them can hide it: what they raise then is logged."""
        for callback in self.callbacks:
            if error is None:
                callback.on_end(self.run, None)
                continue
            try:
                callback.on_end(self.run, error)
            except Exception as second:
                _log.error("%s.on_end raised %s: %s", type(callback).__name__, type(second).__name__, second)
