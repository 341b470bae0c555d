"""When a run whose losses or gradients stay non-finite ends, and what it says then."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hybridtrain.config import schema
from hybridtrain.errors import UserError
from hybridtrain.training.callbacks import StepInfo
from hybridtrain.training.nonfinite import NonFiniteCheck
from hybridtrain.types import StepResult
from tests.dispatch import NoWait

FINE, BAD_GRADIENT, BAD_LOSS = (2.5, 0), (2.5, 1), (math.nan, 1)
"""(loss, skipped) of a step."""


def step(number: int, *, loss: float, skipped: int, scale: float, last: bool) -> StepInfo:
    numbers = [torch.tensor(value) for value in (1.0, float(skipped), 0.0, scale, scale)]
    result = StepResult(torch.tensor(loss), torch.tensor([loss]), torch.tensor([8]), *numbers)
    return StepInfo(step=number, last=last, stopping=False, tokens_seen=8, lr=0.1, result=result, flags={})


def ended(
    *steps: tuple[float, int, float], last: bool = False, kind: str = "fp16_mixed", **precision: Any
) -> str:
    """The message that ends a run of these steps (loss, skipped, scale), with its step; "" if none does."""
    config = schema.Config()
    config.precision = schema.PrecisionConfig(kind=kind, **precision)
    config.train.max_nonfinite = 3
    check = NonFiniteCheck(config, new_run=True)
    for number, (loss, skipped, scale) in enumerate(steps, start=1):
        info = step(number, loss=loss, skipped=skipped, scale=scale, last=last and number == len(steps))
        try:
            check(info, wait=True)
        except UserError as error:
            return f"{number}: {error}"
    return ""


def test_a_loss_scale_that_falls_is_not_stuck_until_it_is_at_its_floor() -> None:
    falling = [(*BAD_GRADIENT, 2.0**power) for power in range(16, 3, -1)]
    assert ended(*falling, min_scale=8.0) == ""
    said = ended(*falling, *[(*BAD_GRADIENT, 8.0)] * 9, min_scale=8.0)
    assert said.startswith(f"{len(falling) + 3}: train.max_nonfinite=3: the gradients of 3 steps in a row")
    assert "(loss 2.5, loss scale 8)" in said
    assert "a lower precision.min_scale" in said


def test_finite_steps_and_falls_start_the_count_anew() -> None:
    bad = (*BAD_GRADIENT, 1.0)
    assert ended(bad, bad, (*FINE, 1.0), bad, bad) == ""
    assert ended(bad, bad, (*BAD_GRADIENT, 2.0), bad, bad) == ""


def test_no_scale_makes_a_loss_finite() -> None:
    said = ended(*[(*BAD_LOSS, 2.0**power) for power in (16, 15, 14)])
    assert said.startswith(
        "3: train.max_nonfinite=3: the loss of 3 steps in a row, up to step 3, was not finite"
    )
    assert "no loss scale makes a loss finite" in said


def test_a_static_scale_does_not_fall() -> None:
    said = ended(*[(*BAD_GRADIENT, 1024.0)] * 3, static_scale=1024.0)
    assert "the gradients of 3 steps in a row" in said
    assert "precision.static_scale=null" in said


@pytest.mark.parametrize("kind", ["fp32", "bf16_mixed"])
def test_without_loss_scaling_each_step_counts(kind: str) -> None:
    for bad, what in ((BAD_LOSS, "the loss of 3"), (BAD_GRADIENT, "the gradients of 3")):
        said = ended(*[(*bad, 1.0)] * 3, kind=kind)
        assert what in said
        assert "loss scale" not in said


def test_it_never_waits_between_lines() -> None:
    config = schema.Config()
    config.precision.kind = "fp16_mixed"
    check = NonFiniteCheck(config, new_run=True)
    steps = [
        step(number, loss=math.nan, skipped=1, scale=1.0, last=False)
        for number in range(1, config.train.max_nonfinite + 1)
    ]
    with NoWait():
        for info in steps[:-1]:
            check(info, wait=False)
    with pytest.raises(UserError, match="the loss of 20 steps"):
        check(steps[-1], wait=False)


def test_a_run_without_an_update_ends_with_an_error() -> None:
    falling = [(*BAD_GRADIENT, 2.0**power) for power in (16, 15)]
    assert "the gradients of all 2 steps were not finite" in ended(*falling, last=True)
    assert ended((*FINE, 16.0), *falling, last=True) == ""
