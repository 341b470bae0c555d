"""What happens around the steps of a run: the user's own code and ours, which is written in the same way (builtin.py).

    class Stopper(ht.Callback):
        def on_evaluate(self, run, metrics):
            if metrics["eval_loss"] < 2.0:
                run.stop("good enough")

Every rank calls every callback, in the same order and after the same steps. In `on_start`, `on_evaluate`, `on_step` and
`on_checkpoint` a callback may use torch.distributed, on all ranks alike: the ranks wait for each other behind these. An exception
in a callback ends the run, and the error report names the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from hybridtrain import registry
from hybridtrain.config.schema import Config
from hybridtrain.errors import refusal
from hybridtrain.runtime import failure, log
from hybridtrain.runtime.stop import Stop
from hybridtrain.types import Engine, StepResult

_log = log.get("train")


@dataclass
class StepInfo:
    """An optimizer step that has just ended."""

    step: int
    """Optimizer steps done, this one included."""
    last: bool
    stopping: bool
    """The run ends after this step, before its last one."""
    tokens_seen: int
    lr: float
    result: StepResult
    """Tensors on the device: to read one is to wait for the step."""
    flags: Mapping[str, int]
    """How many ranks have raised each flag (runtime/flags.py), the same on every rank."""
    evaluated: dict[str, float] = field(default_factory=dict)
    """The metrics of an evaluation after this step; empty without one."""
    row: dict[str, Any] | None = None
    """The line of metrics.jsonl, if this step has one; the same on all ranks but for speed and memory."""


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

    def on_every_step(self, run: Run, info: StepInfo) -> None:
        """After every optimizer step, logged or not. Reading a tensor of `info.result` waits for the device and slows training down."""

    def on_step(self, run: Run, metrics: Mapping[str, Any]) -> None:
        """After each logged step (train.log_every). `metrics`: the line of metrics.jsonl; speed and memory are this rank's, the rest is equal on all ranks."""

    def on_evaluate(self, run: Run, metrics: Mapping[str, float]) -> None:
        """After an evaluation (train.eval_every), before `on_step` of the same step. `metrics`: `eval_loss`, and what else the task evaluates."""

    def on_checkpoint(self, run: Run, path: Path) -> None:
        """A checkpoint is complete on disk; training may have continued in the meantime."""

    def on_end(self, run: Run, error: BaseException | None) -> None:
        """The last call, the callback that was added last first. `error`: the exception that ended the run; None if it finished or was stopped."""


def registered(config: Config) -> tuple[Callback, ...]:
    """The callbacks that run.callbacks names: a class is made without arguments, a function is called with the config. Raises UserError for what is none."""
    result = []
    for name in config.run.callbacks:
        made = registry.make("callback", name, config)
        if not isinstance(made, Callback):
            problem, instead = f"its factory returned {type(made).__name__}", f'@ht.register("callback", "{name}") above a class that inherits ht.Callback'
            raise refusal("run.callbacks", f"[{name}]", problem, allowed="an ht.Callback", instead=instead)
        result.append(made)
    return tuple(result)


class UnevenCallback(RuntimeError):
    """A callback waited for other ranks, and they did not come."""


class Callbacks:
    """All callbacks of a run, ours and the user's, in order. A context: `on_start` when it is entered, `on_end` when it is left."""

    def __init__(self, run: Run, *, beat: Callable[[], None]):
        """`beat` is called before each callback: the watchdog allows each the time of a step."""
        self.run, self._beat = run, beat
        self.callbacks: list[Callback] = []
        self.of_user: tuple[Callback, ...] = ()

    def add(self, *callbacks: Callback, of_user: bool) -> None:
        """Call these after those that were added before."""
        self.callbacks += callbacks
        if of_user:
            self.of_user += callbacks

    def __enter__(self) -> Callbacks:
        try:
            for callback in self.callbacks:
                self._call(callback, "on_start")
        except BaseException as error:
            self._end(error)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end(error)

    def after_step(self, info: StepInfo) -> None:
        """Each callback sees the step, and what those before it have evaluated and logged."""
        self.run.step, self.run.tokens_seen = info.step, info.tokens_seen
        for callback in self.callbacks:
            self._call(callback, "on_every_step", info)
            if info.row is None:
                continue
            if info.evaluated:
                self._call(callback, "on_evaluate", dict(info.evaluated))
            self._call(callback, "on_step", dict(info.row))

    def saved(self, path: Path) -> None:
        """A checkpoint is complete."""
        for callback in self.callbacks:
            self._call(callback, "on_checkpoint", path)

    def _call(self, callback: Callback, method: str, *arguments: Any) -> None:
        self._beat()
        try:
            getattr(callback, method)(self.run, *arguments)
        except RuntimeError as error:
            if not (callback in self.of_user and failure.is_timeout(error)):
                raise
            name, limit = f"{type(callback).__name__}.{method}", f"engine.timeout_s={self.run.config.engine.timeout_s}"
            words = f"{name} waited for the other ranks until {limit} had passed: a callback calls a collective on every rank or on none"
            raise UnevenCallback(words)  # noqa: B904 - a cause would be taken for what failed

    def _end(self, error: BaseException | None) -> None:
        """Tell every callback. Raises the first error of theirs if the run had none; what they raise after it is logged and cannot hide it."""
        first = error
        for callback in reversed(self.callbacks):
            try:
                self._call(callback, "on_end", first)
            except Exception as second:
                if first is None:
                    first = second
                else:
                    _log.error("%s.on_end raised %s: %s", type(callback).__name__, type(second).__name__, second)
        if first is not error:
            assert first is not None
            raise first
