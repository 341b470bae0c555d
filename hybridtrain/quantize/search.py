"""A scheme for each linear layer, within a budget of perplexity.

1  each layer alone in each scheme, or those that share one (joined.py): divergence (KL) from the
   reference, on a few rows. Divergences add up, and unlike changes of the loss they are never negative
2  from the widest scheme down, the step that saves most bits for its divergence, until the sum would be
   above log(1 + budget)
3  measured on other rows, as it would be written: the last steps are undone, as few as may be (found by
   halving), until the increase of the perplexity plus three standard errors is within the budget
4  reported on a third set of rows

Three, since the budget is kept on other rows: two means of as many rows differ by sqrt(2) standard errors,
and a bound is two of those.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hybridtrain.errors import refusal
from hybridtrain.quantize import walk
from hybridtrain.quantize.experts import key
from hybridtrain.quantize.measure import Measured, against, predicted
from hybridtrain.quantize.schemes import Scheme
from hybridtrain.quantize.walk import Quantised
from hybridtrain.runtime import log
from hybridtrain.types import Batch

_ERRORS = 3.0
_KEPT = 1 << 30  # bytes of logits
_log = log.get("quantize")

Candidates = Mapping[str, Sequence[Sequence[Quantised]]]
"""Path of the first of layers of one scheme -> these in each scheme, the widest first."""
Written = Callable[[Sequence[Quantised]], AbstractContextManager[Any]]
"""The model that would be written of a plan, inside the `with` block."""


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
    written: Written,
) -> Found:
    """See above. `budget`: relative increase of the perplexity."""
    divergences = _scan(Predictions(reference, rows), copy.deepcopy(reference), candidates)
    steps = _affordable(greedy(candidates, divergences), limit=math.log1p(budget))

    known = Predictions(reference, verify)

    def measured_after(count: int) -> Measured:
        with written(_after(candidates, steps[:count])) as model:
            measured = against(known, model)
        _log.info("%d steps: perplexity %+.3f %% at most", count, 100 * at_most(measured))
        return measured

    number, measured = kept(len(steps), measured_after, budget=budget)
    plan = _after(candidates, steps[:number])
    schemes = {key(each.linear): each.scheme for each in plan}
    expected = sum(step.divergence for step in steps[:number])
    return Found(schemes, number, len(steps) - number, expected, measured)


class Predictions:
    """The logits of a model on batches, to be gone through several times: kept, if they are not too many."""

    def __init__(self, model: Any, batches: Sequence[Batch]):
        self._model, self._batches = model, batches
        tokens = sum(batch.labels_BT.numel() for batch in batches)
        small = 4 * tokens * model.get_input_embeddings().num_embeddings <= _KEPT
        self._kept = list(predicted(model, batches)) if small else None

    def __iter__(self) -> Iterator[tuple[Tensor, Batch]]:
        return predicted(self._model, self._batches) if self._kept is None else iter(self._kept)


def kept(count: int, measured_after: Callable[[int], Measured], *, budget: float) -> tuple[int, Measured]:
    """(the most of the first `count` steps that keep the budget, measured; without any, if none do)."""
    good, bad, at = -1, count + 1, count
    best = None
    while bad - good > 1:
        measured = measured_after(at)
        if at == count:
            _warn(measured, budget)
        if at_most(measured) <= budget:
            good, best = at, measured
        else:
            bad = at
            best = best if good >= 0 else measured
        at = (max(good, 0) + bad) // 2
    assert best is not None
    return max(good, 0), best


def _warn(measured: Measured, budget: float) -> None:
    """Where errors take more than the budget, whatever the plan costs."""
    bound = _ERRORS * measured.change.error
    if bound > budget:
        _log.warning(
            "%d tokens are few for a budget of %.3g %%: they measure the plan to +-%.3g %%, so that a larger "
            "one is taken; %d would do (more held-out rows)",
            *(measured.tokens, 100 * budget, 100 * bound, tokens_needed(measured, budget)),
        )


def at_most(measured: Measured) -> float:
    """The relative increase of the perplexity, with a bound for the error on other rows."""
    return math.expm1(measured.change.value + _ERRORS * measured.change.error)


def tokens_needed(measured: Measured, budget: float) -> int:
    """Tokens with which the bound for errors would be half of the budget."""
    return math.ceil(measured.tokens * (2 * _ERRORS * measured.change.error / budget) ** 2)


def _scan(
    known: Iterable[tuple[Tensor, Batch]], other: Any, candidates: Candidates
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
