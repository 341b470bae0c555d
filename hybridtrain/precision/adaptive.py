"""Adaptive precision: each linear layer climbs a ladder of formats where its numbers do not fit, and comes
down where they would fit again.

Decided on the reduced statistics of sampled steps (numerics.py), which are equal on all ranks and, but for a
few counts, under every layout. The thresholds lie in a wide gap: shares of healthy layers are below 0.01, of
broken ones near 1. So decisions are the same under every layout, and after a resumption.

    broken   overflow, or too large a share lost to underflow, in the present format; with one scale for a
             tensor, which is an upper bound of what fp8_rowwise loses
    healthy  neither in the format one rung below, with half the thresholds: probed on the same sample

A layer is promoted after `patience` broken samples in a row, at once if its result is not finite, and demoted
after `wait` healthy ones; `wait` doubles with each promotion, so that a layer changes a few times at most.
What is not finite already when it reaches a layer is no fault of the layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hybridtrain.plan.formats import FORMATS, HIGH, Format
from hybridtrain.precision.histogram import shares, tensorwise_scale
from hybridtrain.precision.numerics import Sample, Statistics

UNDERFLOW = 0.25
"""Share of the numbers that are not zero and become it. Healthy layers lose up to 0.005, broken ones 0.98."""
OVERFLOW = 1e-6
WAIT = 10
"""Half of the healthy samples before the first demotion."""
FIRST_STEPS = 8
"""Sampled all: most of what adapting loses is lost before the first decisions."""


@dataclass(frozen=True)
class State:
    """Of one layer."""

    rung: int
    """Place of its format in the ladder."""
    bad: int
    """Broken samples in a row."""
    ok: int
    """Healthy samples in a row."""
    wait: int
    """Of those, as many as a demotion needs."""


START = State(0, 0, 0, WAIT)


@dataclass(frozen=True)
class Decision:
    """A change of a layer's format."""

    module: str
    before: str
    after: str
    reason: str


@dataclass(frozen=True)
class Verdict:
    """Of a format on a sample."""

    reason: str
    """Why it does not fit; empty: it does."""
    at_once: bool
    """Whether the result was not finite."""


class Controller:
    """Decides after each sampled step. Deterministic: state and sample in, decisions out."""

    def __init__(self, sizes: Mapping[str, int], ladder: Sequence[str], *, patience: int, budget: float):
        """`sizes`: parameters of each layer that adapts, in the order of the model. `budget`: share of them
        that may leave the lowest rung.
        """
        self.sizes, self.ladder, self.patience = sizes, tuple(ladder), patience
        self.budget = budget * sum(sizes.values())
        self.states = dict.fromkeys(sizes, START)
        self.again = True
        """Whether the next step is to be sampled too: at the start, after a decision, and while steps are
        skipped."""

    def decide(self, sample: Sample) -> list[Decision]:
        """What changes after this sample, which is of step `sample.step`."""
        made = [self._of(module, sample.modules.get(module, {})) for module in self.sizes]
        found = [decision for decision in made if decision is not None]
        self.again = bool(found) or sample.skipped or sample.step < FIRST_STEPS
        return found

    def formats(self) -> dict[str, str]:
        """Layer -> its present format."""
        return {module: self.ladder[state.rung] for module, state in self.states.items()}

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON; empty without a layer that adapts."""
        layers = {
            module: [self.ladder[state.rung], state.bad, state.ok, state.wait]
            for module, state in self.states.items()
        }
        return {"version": 1, "again": self.again, "layers": layers} if layers else {}

    def adopt(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of a checkpoint: layers that it does not have, or whose format is not on the
        ladder, begin anew.
        """
        self.again = state.get("again", True)
        self.states = dict.fromkeys(self.sizes, START)
        for module, (name, *counts) in state.get("layers", {}).items():
            if module in self.sizes and name in self.ladder:
                self.states[module] = State(self.ladder.index(name), *counts)

    def _of(self, module: str, roles: Mapping[str, Statistics]) -> Decision | None:
        state = self.states[module]
        verdict = _judge(roles, self.ladder[state.rung], strictness=1.0)
        if verdict is None:  # the input is not finite, or there is none
            return None
        top, size = state.rung + 1 == len(self.ladder), self.sizes[module]
        if verdict.reason and not top:
            state = replace(state, bad=state.bad + 1, ok=0)
            fits = state.rung > 0 or self._promoted() + size <= self.budget
            if fits and (state.bad >= self.patience or verdict.at_once):
                self.states[module] = State(state.rung + 1, 0, 0, 2 * state.wait)
                return self._decision(module, state.rung, state.rung + 1, verdict.reason)
            self.states[module] = state
            return None
        below = _judge(roles, self.ladder[state.rung - 1], strictness=0.5) if state.rung else None
        healthy = not verdict.reason and below is not None and not below.reason
        state = replace(state, bad=0, ok=state.ok + 1 if healthy else 0)
        if healthy and state.ok >= state.wait:
            self.states[module] = replace(state, rung=state.rung - 1, ok=0)
            return self._decision(module, state.rung, state.rung - 1, f"{state.ok} samples would have fitted")
        self.states[module] = state
        return None

    def _promoted(self) -> int:
        return sum(self.sizes[module] for module, state in self.states.items() if state.rung)

    def _decision(self, module: str, before: int, after: int, reason: str) -> Decision:
        return Decision(module, self.ladder[before], self.ladder[after], reason)


def _judge(roles: Mapping[str, Statistics], name: str, *, strictness: float) -> Verdict | None:
    """Whether a format fits a layer's operands; None without a finite input that is not zero. `strictness`:
    factor of the thresholds.
    """
    x = roles.get("x")
    if x is None or x.non_finite or not x.amax:
        return None
    if name == HIGH:
        return Verdict("", at_once=False)
    format_ = FORMATS[name]
    y = roles.get("y")
    largest = format_.w.largest  # which has its output's format
    fits = y is None or bool(format_.scale) or y.amax <= largest * strictness  # NaN does not
    if not fits:
        return Verdict(f"its output overflows {name}", at_once=True)
    for role in ("x", "w", "g"):
        each = roles.get(role)
        if each is None or (role == "g" and each.non_finite):
            continue
        if reason := _lost(each, format_, role, strictness=strictness):
            return Verdict(reason, at_once=False)
    return Verdict("", at_once=False)


def _lost(each: Statistics, format_: Format, role: str, *, strictness: float) -> str:
    """What a format loses of an operand, in words; empty: little."""
    number = getattr(format_, role)
    scale = tensorwise_scale(each.histogram, number) if format_.scale else 0
    found = shares(each.histogram, number, scale=scale)
    if found.underflow > UNDERFLOW * strictness:
        return f"{found.underflow:.1%} of {role} underflows {format_.name}"
    if found.overflow > OVERFLOW * strictness:
        return f"{found.overflow:.2%} of {role} overflows {format_.name}"
    return ""
