"""Callbacks: code that runs before, between and after the steps. The user's, and our own in builtin.py.

    class Stopper(ht.Callback):
        def on_evaluate(self, run, metrics):
            if metrics["eval_loss"] < 2.0:
                run.stop("good enough")

Every rank calls every callback, in the same order and after the same steps. In `on_start`, `on_evaluate`,
`on_numerics`, `on_step` and `on_checkpoint` a callback may call torch.distributed collectives, on all ranks.
An exception in a callback ends the run, and the error report names the rank.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from hybridtrain import registry
from hybridtrain.config.schema import Config
from hybridtrain.errors import refusal
from hybridtrain.precision.numerics import Sample
from hybridtrain.runtime import failure, log
from hybridtrain.runtime.stop import Stop
from hybridtrain.types import Engine, Progress, StepResult

_log = log.get("train")


@dataclass
class StepInfo:
    """The optimizer step that has just ended."""

    step: int
    """Optimizer steps done, including this one."""
    last: bool
    stopping: bool
    """The run ends early, after this step."""
    tokens_seen: int
    lr: float
    result: StepResult
    """Tensors on the device: reading one waits for the step."""
    flags: Mapping[str, int]
    """Flag -> number of ranks that have raised it (runtime/flags.py); the same on every rank."""
    evaluated: dict[str, float] = field(default_factory=dict)
    """Metrics of an evaluation after this step; empty without one."""
    numerics: Sample | None = None
    """What the numerics monitor has found, if this step was sampled; the same on every rank."""
    row: dict[str, Any] | None = None
    """The line of metrics.jsonl, if this step has one. Speed and memory are this rank's, the rest is the
    same on all ranks."""


def _nothing() -> None:
    pass


@dataclass
class Run:
    """The state of the run that is passed to callbacks."""

    config: Config
    dir: Path
    engine: Engine
    """For `weights()` and `modules()`, which return this rank's share of the model."""
    total_steps: int
    step: int
    """Optimizer steps done."""
    tokens_seen: int
    _stop: Stop
    beat: Callable[[], None] = _nothing
    """Call it in what takes longer than train.max_step_s, after which a rank counts as hung."""
    states: dict[str, Callable[[], Mapping[str, Any]]] = field(default_factory=dict)
    """Name -> small state for a checkpoint, as JSON with a `version`; an empty one is not saved."""
    loaded: Mapping[str, Any] = field(default_factory=dict)
    """The small states of the checkpoint from which the run goes on."""

    def stop(self, reason: str) -> None:
        """End the run after the next step, with a checkpoint. One rank is enough.

        `reason` is written to summary.json.
        """
        self._stop.ask(reason)


def stored_state(states: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A small state of a checkpoint; empty if it has none. Raises UserError for one of a later version."""
    state: Mapping[str, Any] = states.get(name, {})
    if state and state.get("version") != 1:
        raise refusal(
            "checkpoint",
            name,
            f"this state has version {state.get('version')}",
            allowed="version 1",
            instead="the release of hybridtrain that wrote the checkpoint",
        )
    return state


class Callback:
    """Methods that a run calls; override those that you need."""

    def on_start(self, run: Run) -> None:
        """Before the first step of this process, after weights or a checkpoint are loaded."""

    def on_every_step(self, run: Run, info: StepInfo) -> None:
        """After every optimizer step.

        Reading a tensor of `info.result` waits for the device, which slows training down.
        """

    def on_numerics(self, run: Run, sample: Sample) -> None:
        """After a step that the numerics monitor has sampled (precision.monitor_every), before `on_step`."""

    def on_step(self, run: Run, metrics: Mapping[str, Any]) -> None:
        """After each logged step (train.log_every).

        `metrics`: the line of metrics.jsonl, with this rank's speed and memory.
        """

    def on_evaluate(self, run: Run, metrics: Mapping[str, float]) -> None:
        """After an evaluation (train.eval_every), before `on_step` of the same step.

        `metrics`: `eval_loss` and the task's others.
        """

    def on_checkpoint(self, run: Run, path: Path) -> None:
        """After a checkpoint is complete on disk; training may have continued in the meantime."""

    def on_rollback(self, run: Run) -> None:
        """After the run has gone back to a checkpoint (train.on_nonfinite, train.on_spike), that of
        `run.step`.
        """

    def on_end(self, run: Run, error: BaseException | None) -> None:
        """The last call, in reverse order of the callbacks.

        `error`: the exception that ended the run, or None.
        """


def from_config(config: Config) -> tuple[Callback, ...]:
    """The callbacks of run.callbacks: a class is called without arguments, a function with the config.

    Raises UserError.
    """
    result: list[Callback] = []
    for name in config.run.callbacks:
        if name == "lm_eval":
            from hybridtrain.training.lm_eval import LmEval

            result.append(LmEval())
            continue
        callback = registry.call("callback", name, config)
        if not isinstance(callback, Callback):
            problem, instead = (
                f"its factory returned {type(callback).__name__}",
                f'@ht.register("callback", "{name}") above a class that inherits ht.Callback',
            )
            raise refusal("run.callbacks", f"[{name}]", problem, allowed="an ht.Callback", instead=instead)
        _warn_of_unknown_methods(callback)
        result.append(callback)
    return tuple(result)


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Refuse what is no callback (raises UserError), and warn of methods that no run calls."""
    for index, callback in enumerate(callbacks):
        if not isinstance(callback, Callback):
            name = callback.__name__ if isinstance(callback, type) else type(callback).__name__
            made = isinstance(callback, type) and issubclass(callback, Callback)
            problem = "it is a class" if made else "it does not inherit ht.Callback"
            instead = f"{name}(...)" if made else f"class {name}(ht.Callback)"
            raise refusal(
                f"callbacks[{index}]", name, problem, allowed="ht.Callback objects", instead=instead
            )
        _warn_of_unknown_methods(callback)


def _warn_of_unknown_methods(callback: Callback) -> None:
    known = [name for name in dir(Callback) if name.startswith("on_")]
    for name in dir(callback):
        if name.startswith("on_") and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            _log.warning("no run calls %s.%s; there is %s", type(callback).__name__, name, near)


class CallbackTimeout(RuntimeError):
    """A callback waited for the other ranks until the time-out."""


class Callbacks:
    """All callbacks of a run, in order.

    As a context manager, calls `on_start` on entry and `on_end` on exit.
    """

    def __init__(self, run: Run, *, beat: Callable[[], None]):
        """`beat` is called before each callback, so that the watchdog allows each the time of a step."""
        self.run, self.beat = run, beat
        self.callbacks: list[Callback] = []
        self.of_user: tuple[Callback, ...] = ()

    def add(self, *callbacks: Callback, of_user: bool) -> None:
        """Append callbacks. `of_user`: whether they are the user's."""
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(error)

    def after_step(self, info: StepInfo) -> None:
        """Call the methods of a step on each callback; it sees the metrics of those before it."""
        self.run.step, self.run.tokens_seen = info.step, info.tokens_seen
        for callback in self.callbacks:
            self._call(callback, "on_every_step", info)
            if info.numerics is not None:
                self._call(callback, "on_numerics", info.numerics)
            if info.row is None:
                continue
            if info.evaluated:
                self._call(callback, "on_evaluate", dict(info.evaluated))
            self._call(callback, "on_step", dict(info.row))

    def after_checkpoint(self, path: Path) -> None:
        """Call `on_checkpoint` on each callback."""
        for callback in self.callbacks:
            self._call(callback, "on_checkpoint", path)

    def after_rollback(self, back: Progress) -> None:
        """Call `on_rollback` on each callback."""
        self.run.step, self.run.tokens_seen, self.run.loaded = back.step, back.tokens_seen, back.states
        for callback in self.callbacks:
            self._call(callback, "on_rollback")

    def _call(self, callback: Callback, method: str, *arguments: Any) -> None:
        self.beat()
        try:
            getattr(callback, method)(self.run, *arguments)
        except RuntimeError as error:
            if not (callback in self.of_user and failure.is_timeout(error)):
                raise
            name, limit = (
                f"{type(callback).__name__}.{method}",
                f"engine.timeout_s={self.run.config.engine.timeout_s}",
            )
            problem = (
                f"{name} waited for the other ranks until {limit} had passed: "
                "a callback must call a collective on every rank or on none"
            )
            raise CallbackTimeout(problem)  # noqa: B904 - with a cause, the report would name that

    def _end(self, error: BaseException | None) -> None:
        """Call `on_end` on every callback.

        Raises their first error unless the run ended with one; further errors are logged.
        """
        first = error
        for callback in reversed(self.callbacks):
            try:
                self._call(callback, "on_end", first)
            except Exception as further:
                if first is None:
                    first = further
                else:
                    _log.error(
                        "%s.on_end raised %s: %s", type(callback).__name__, type(further).__name__, further
                    )
        if first is not error:
            assert first is not None
            raise first
