"""The law of adaptive precision, on made-up samples: who is promoted, who is not, who comes down again."""

import dataclasses
import json
from typing import Any

import pytest

from hybridtrain.config.schema import PrecisionConfig
from hybridtrain.precision.adaptive import WAIT, Controller
from hybridtrain.precision.numerics import Sample, Statistics, formats_of


def numbers(*bins: tuple[int, int], amax: float = 1.0) -> Statistics:
    """Statistics of numbers of the magnitudes 2^e, as (e, how many)."""
    histogram = [0] * 256
    for exponent, count in bins:
        histogram[255 if exponent == 128 else exponent + 127] = count
    return Statistics(tuple(histogram), amax, None, None)


FINE = numbers((0, 500), (-3, 500))
SPREAD = numbers((0, 10), (-40, 990))
"""One large channel: with its scale, the rest underflows in fp8."""
INFINITE = numbers((0, 999), (128, 1), amax=float("inf"))


def largest(amax: float) -> Statistics:
    return Statistics((), amax, None, None)


def sample(**modules: dict[str, Statistics]) -> Sample:
    return Sample(1, 1.0, False, formats_of(PrecisionConfig()), modules, {})


def controller(*ladder: str, budget: float = 1.0, **sizes: int) -> Controller:
    return Controller(sizes or {"a": 10, "b": 10}, ladder, patience=2, budget=budget)


def roles(**changed: Statistics) -> dict[str, Statistics]:
    return {"x": FINE, "w": FINE, "g": FINE, **changed}


@pytest.mark.parametrize("role", ["x", "w", "g"])
def test_a_layer_is_promoted_after_two_broken_samples(role: str) -> None:
    law = controller("fp8_tensorwise", "bf16")
    bad = sample(a=roles(**{role: SPREAD}), b=roles())
    assert law.decide(bad) == []
    (decision,) = law.decide(bad)
    assert (decision.module, decision.before, decision.after) == ("a", "fp8_tensorwise", "bf16")
    assert decision.reason == f"99.0% of {role} underflows fp8_tensorwise"
    assert law.formats() == {"a": "bf16", "b": "fp8_tensorwise"}
    assert law.decide(bad) == []  # it is at the top


def test_one_broken_sample_is_forgotten_after_a_good_one() -> None:
    law = controller("fp8_tensorwise", "bf16")
    for _ in range(3):
        assert law.decide(sample(a=roles(x=SPREAD), b=roles())) == []
        assert law.decide(sample(a=roles(), b=roles())) == []


def test_the_layer_that_overflows_is_promoted_at_once_and_those_behind_it_are_not() -> None:
    law = controller("fp16", "bf16")
    step = sample(a=roles(y=largest(float("inf"))), b={"x": INFINITE, "w": FINE, "g": INFINITE})
    (decision,) = law.decide(step)
    assert (decision.module, decision.reason) == ("a", "its output overflows fp16")
    assert law.decide(sample(a=roles(g=INFINITE, y=largest(7e4)), b=roles(g=INFINITE))) == []
    assert law.formats() == {"a": "bf16", "b": "fp16"}


def test_a_gradient_that_is_too_small_for_fp16_breaks_it() -> None:
    law = controller("fp16", "bf16")
    for _ in range(2):
        made = law.decide(sample(a=roles(g=numbers((-26, 500), (-10, 500))), b=roles()))
    assert [each.module for each in made] == ["a"]


def test_a_layer_comes_down_when_the_rung_below_would_fit_and_waits_longer_each_time() -> None:
    law, waited = controller("fp8_tensorwise", "bf16"), []
    for _ in range(3):
        while not law.decide(sample(a=roles(x=SPREAD), b=roles())):
            pass
        steps = 1
        while not law.decide(sample(a=roles(), b=roles())):
            steps += 1
        waited.append(steps)
    assert waited == [2 * WAIT, 4 * WAIT, 8 * WAIT]


def test_it_does_not_come_down_to_find_out() -> None:
    law = controller("fp16", "bf16")
    law.decide(sample(a=roles(y=largest(float("inf"))), b=roles()))
    almost = sample(a=roles(y=largest(40000.0)), b=roles())  # fits, but not with half the largest number
    assert not any(law.decide(almost) for _ in range(100))


def test_a_dead_input_says_nothing() -> None:
    law = controller("fp8_tensorwise", "bf16")
    dead = numbers((-127, 1000), amax=0.0)
    assert not any(law.decide(sample(a=roles(x=dead, g=SPREAD), b=roles())) for _ in range(5))


def test_the_budget_is_kept_in_the_order_of_the_model() -> None:
    law = controller("fp8_tensorwise", "bf16", budget=0.5, a=10, b=10, c=10)
    bad = sample(**{name: roles(x=SPREAD) for name in "abc"})
    made = [decision.module for _ in range(5) for decision in law.decide(bad)]
    assert made == ["a"]


def test_three_rungs() -> None:
    law = controller("fp8_tensorwise", "fp16", "fp32")
    step = sample(a=roles(x=SPREAD, y=largest(1e9)), b=roles())
    made = [decision.after for _ in range(5) for decision in law.decide(step)]
    assert made == ["fp16", "fp32"]


def test_decisions_go_on_after_a_resumption_in_the_middle_of_a_count() -> None:
    steps: list[Any] = [sample(a=roles(x=SPREAD), b=roles())] * 2 + [sample(a=roles(), b=roles())] * 2 * WAIT
    through = controller("fp8_tensorwise", "bf16")
    expected = [through.decide(step) for step in steps]
    for cut in (1, 2, 3, 5):
        first, second = (controller("fp8_tensorwise", "bf16") for _ in range(2))
        made = [first.decide(step) for step in steps[:cut]]
        second.adopt(first.state())
        assert made + [second.decide(step) for step in steps[cut:]] == expected
        assert dataclasses.asdict(second.states["a"]) == dataclasses.asdict(through.states["a"])


def test_states_are_adopted_by_name_and_format() -> None:
    """Under other rules and another ladder; what is not known begins anew."""
    first = controller("fp8_rowwise", "bf16", a=10, b=10, c=10)
    step = sample(a=roles(x=SPREAD), b=roles(), c=roles())
    for _ in range(2):
        first.decide(step)
    state = json.loads(json.dumps(first.state()))
    second = controller("fp16", "fp8_rowwise", "bf16", z=10, c=10, a=10)
    second.adopt(state)
    assert second.formats() == {"z": "fp16", "c": "fp8_rowwise", "a": "bf16"}
    assert second.states["a"].wait == 2 * WAIT
    assert second.again
    third = controller("int8", "fp32", a=10)
    third.adopt(state)
    assert third.formats() == {"a": "int8"}
    third.adopt({})
    assert third.formats() == {"a": "int8"}
