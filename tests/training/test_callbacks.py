"""The order in which callbacks are called, and what becomes of errors in them."""

# ruff: noqa: ARG002 - a callback has the arguments of its interface

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hybridtrain.training.callbacks import Callback, Callbacks, Run, StepInfo
from hybridtrain.types import StepResult


class Named(Callback):
    """Writes its calls into a list that several share, and raises in one of them."""

    def __init__(self, name: str, calls: list[str], *, breaks: str) -> None:
        self.name, self.calls, self.breaks = name, calls, breaks

    def _call(self, method: str, more: str = "") -> None:
        self.calls.append(f"{self.name}.{method}{more}")
        if method == self.breaks:
            raise ZeroDivisionError(f"{self.name}.{method}")

    def on_start(self, run: Run) -> None:
        self._call("start")

    def on_every_step(self, run: Run, info: StepInfo) -> None:
        self._call("every")

    def on_end(self, run: Run, error: BaseException | None) -> None:
        self._call("end", f" {error}")


class Logs(Callback):
    def on_every_step(self, run: Run, info: StepInfo) -> None:
        info.row = {"loss": 1.0}


class Reads(Named):
    def on_step(self, run: Run, metrics: Any) -> None:
        self._call("step", f" {metrics['loss']}")


def of(*callbacks: Callback) -> Callbacks:
    run: Any = Run(config=None, dir=Path(), engine=None, total_steps=2, step=0, tokens_seen=0, _stop=None)  # type: ignore[arg-type]
    all_of_them = Callbacks(run, beat=lambda: None)
    for callback in callbacks:
        all_of_them.add(callback, of_user=True)
    return all_of_them


def step() -> StepInfo:
    zero = torch.zeros(())
    result = StepResult(
        loss=zero,
        sums=zero[None],
        counts=zero[None],
        grad_norm=zero,
        skipped=zero,
        empty=zero,
        loss_scale=zero,
        next_scale=zero,
    )
    return StepInfo(step=1, last=False, stopping=False, tokens_seen=8, lr=0.1, result=result, flags={})


def test_each_sees_what_those_before_it_have_logged_and_the_last_ends_first() -> None:
    calls: list[str] = []
    with of(Reads("a", calls, breaks=""), Logs(), Reads("b", calls, breaks="")) as callbacks:
        callbacks.after_step(step())
        assert callbacks.run.step == 1
    assert calls == ["a.start", "b.start", "a.every", "b.every", "b.step 1.0", "b.end None", "a.end None"]


@pytest.mark.parametrize("method", ["start", "every", "end"])
def test_whatever_one_raises_every_callback_is_told_of_it_at_the_end(method: str) -> None:
    calls: list[str] = []
    with (
        pytest.raises(ZeroDivisionError, match=f"b.{method}"),
        of(*(Named(name, calls, breaks=method if name == "b" else "") for name in "abc")) as callbacks,
    ):
        callbacks.after_step(step())
    ends = [call for call in calls if ".end" in call]
    known = "None" if method == "end" else f"b.{method}"
    assert ends == [f"c.end {known}", f"b.end {known}", f"a.end b.{method}"]


def test_an_error_at_the_end_does_not_hide_the_one_that_ended_the_run() -> None:
    calls: list[str] = []
    with (
        pytest.raises(ValueError, match="planted"),
        of(Named("a", calls, breaks="end"), Named("b", calls, breaks="end")),
    ):
        raise ValueError("planted")
    assert calls[-2:] == ["b.end planted", "a.end planted"]
