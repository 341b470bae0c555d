"""A scheme for each linear layer, within a budget of perplexity.

1  each layer alone in each scheme, or those that share one (joined.py): divergence (KL) from the
   reference, on a few rows. Divergences add up, and unlike changes of the loss they are never negative
2  from the widest scheme down, the step that saves most bits for its divergence, until the sum would be
   above log(1 + budget)
3  measured on other rows: while the increase of the perplexity plus two standard errors is above the
   budget, the last twelfth of the steps is undone
4  reported on a third set of rows
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hybridtrain.errors import refusal
from hybridtrain.quantize import walk
from hybridtrain.quantize.experts import key
from hybridtrain.quantize.measure import Measured, against, measure, predicted
from hybridtrain.quantize.schemes import Scheme
from hybridtrain.quantize.walk import Quantised
from hybridtrain.runtime import log
from hybridtrain.types import Batch

_UNDONE = 12
"""Of the steps, the share that is undone at a time."""
_log = log.get("quantize")

Candidates = Mapping[str, Sequence[Sequence[Quantised]]]
"""Path of the first of layers of one scheme -> these in each scheme, the widest first."""


@dataclass(frozen=True)
class Step:
    """Layers of one scheme are stored in fewer bits."""

    path: str
    to: int
    """Place of its scheme among the candidates."""
    divergence: float
    """Added to that of the step before."""


@dataclass(frozen=True)
class Found:
    """A plan that keeps the budget on the rows it was verified on."""

    plan: Mapping[str, Scheme]
    steps: int
    undone: int
    expected: float
    """Sum of the divergences of its layers."""
    verified: Measured


def search(
    reference: Any,
    candidates: Candidates,
    *,
    budget: float,
    rows: Sequence[Batch],
    verify: Sequence[Batch],
) -> Found:
    """See above. `budget`: relative increase of the perplexity."""
    other = copy.deepcopy(reference)
    divergences = _scan(list(predicted(reference, rows)), other, candidates)
    steps = _affordable(greedy(candidates, divergences), limit=math.log1p(budget))
    count = len(steps)
    while True:
        plan = _after(candidates, steps)
        with walk.changed(other, plan):
            measured = measure(reference, other, verify)
        _log.info("%d steps: perplexity %+.3f %% at most", len(steps), 100 * measured.most)
        if measured.most <= budget or not steps:
            break
        steps = steps[: len(steps) - max(1, count // _UNDONE)]
    schemes = {key(each.linear): each.scheme for each in plan}
    expected = sum(step.divergence for step in steps)
    return Found(schemes, len(steps), count - len(steps), expected, measured)


def _scan(
    known: Sequence[tuple[Tensor, Batch]], other: Any, candidates: Candidates
) -> Mapping[str, Sequence[float]]:
    """Path -> divergence in each of its schemes, of these layers alone; of wider schemes never more. `known`:
    the logits of the reference, of which `other` is a copy.
    """
    found = {}
    for number, (path, layers) in enumerate(candidates.items(), 1):
        values: list[float] = []
        for each in layers:
            with walk.changed(other, each):
                divergence = against(known, other).mean("kl").value
            if not math.isfinite(divergence):
                raise refusal(
                    "quantize.source",
                    path,
                    f"in {each[0].scheme.name} its model predicts no numbers on the calibration rows",
                    allowed="finite weights, and rows with tokens that count",
                    instead="another source or other rows",
                )
            values.append(max([0.0, divergence, *values]))
        found[path] = values
        _log.info("scan %d/%d: %s", number, len(candidates), path)
    return found


def greedy(candidates: Candidates, divergences: Mapping[str, Sequence[float]]) -> list[Step]:
    """All steps from the widest schemes to the narrowest, those that save most for their divergence first.

    A step may pass schemes: one that costs little is not kept back by one before it that costs more.
    """
    at = dict.fromkeys(candidates, 0)
    steps: list[Step] = []
    while True:
        best: tuple[float, Step] | None = None
        for path, layers in candidates.items():
            here = at[path]
            for to in range(here + 1, len(layers)):
                saved = _bits(layers[here]) - _bits(layers[to])
                cost = divergences[path][to] - divergences[path][here]
                value = saved / max(cost, 1e-12)
                if saved > 0 and (best is None or value > best[0]):
                    best = value, Step(path, to, cost)
        if best is None:
            return steps
        steps.append(best[1])
        at[best[1].path] = best[1].to


def _affordable(steps: Sequence[Step], *, limit: float) -> list[Step]:
    """The first ones whose divergences add up to `limit` at most."""
    total, count = 0.0, 0
    for step in steps:
        total += step.divergence
        if total > limit:
            break
        count += 1
    return list(steps[:count])


def _after(candidates: Candidates, steps: Sequence[Step]) -> list[Quantised]:
    at = dict.fromkeys(candidates, 0)
    for step in steps:
        at[step.path] = step.to
    return [each for path, layers in candidates.items() for each in layers[at[path]]]


def _bits(layers: Sequence[Quantised]) -> int:
    return sum(each.scheme.stored_bits(each.linear.outputs, each.linear.inputs) for each in layers)
