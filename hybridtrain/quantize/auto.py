"""quantize.plan=auto: a plan, measured on rows that it was not searched on, beside uniform schemes."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from hybridtrain.errors import refusal
from hybridtrain.models.init import WeightSource
from hybridtrain.quantize import joined, schemes, table, walk
from hybridtrain.quantize.experts import key
from hybridtrain.quantize.measure import Measured, against, measure
from hybridtrain.quantize.plan import Plan, choice
from hybridtrain.quantize.schemes import Scheme
from hybridtrain.quantize.search import Found, Predictions, at_most, search, tokens_needed
from hybridtrain.quantize.sets import ROWS, Sets
from hybridtrain.quantize.walk import Quantised
from hybridtrain.types import Batch

LADDER, BUDGET = "quantize.ladder", "quantize.budget"


def ladder(names: Sequence[str]) -> list[Scheme]:
    """The schemes of a ladder, widest first. Raises UserError for one that does not descend."""
    found = [schemes.parse(name, field=LADDER) for name in names]
    sizes = [scheme.stored_bits(1 << 10, 1 << 10) for scheme in found]
    if len(found) < 2 or any(low >= high for high, low in itertools.pairwise(sizes)):
        raise refusal(
            LADDER,
            list(names),
            "each scheme must take fewer bits than the one before it",
            allowed="two schemes or more, the widest first",
            instead=f"{LADDER}=[bf16,int8,int4-g32-gptq]",
        )
    return found


def found(
    reference: Any,
    built: Any,
    source: WeightSource,
    steps: Sequence[Scheme],
    *,
    budget: float,
    calibration: Sequence[Batch],
    rows: Sets,
    plan_of: Callable[[Scheme], Plan],
    dtype: torch.dtype,
    one: bool,
) -> tuple[Plan, dict[str, Any]]:
    """(plan, results: a table of it and of uniform schemes on a third set of rows).

    `plan_of`: the plan of one scheme for all; raises UserError for one that does not fit. `dtype`: of all
    that is not in codes. `one`: whether layers that read the same input have one scheme. Raises UserError if
    no plan keeps the budget.
    """
    calibrated = _Calibrated(built, source, calibration, reference.device)
    uniform = {scheme.name: calibrated.layers(plan_of(scheme)) for scheme in steps}
    first = next(iter(uniform.values()))
    together = joined.sets(reference, [each.linear for each in first.values()], rows.search[0], joined=one)
    candidates = joined.candidates(list(uniform.values()), together)
    model = copy.deepcopy(reference)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)

    def written(layers: Sequence[Quantised]) -> AbstractContextManager[Any]:
        plan = {key(each.linear): each.scheme for each in _coded(layers)}
        return _put(model, calibrated.layers(plan).values())

    result = search(
        reference, candidates, budget=budget, rows=rows.search, verify=rows.verify, written=written
    )
    _check(result, budget, steps)
    found = []
    known = Predictions(reference, rows.report)
    chosen = {path: uniform[result.plan[key(each.linear)].name][path] for path, each in first.items()}
    for name, layers in {**uniform, "plan": chosen}.items():
        values = list(layers.values())
        with written(values) if name == "plan" else _put(model, _coded(values)):
            measured = against(known, model)
        found.append(table.row(name, measured, stored=table.stored_bytes(reference, values), layers=values))
    return result.plan, {
        "budget": budget,
        "steps": result.steps,
        "undone": result.undone,
        "expected_kl": result.expected,
        "verified": _increase(result.verified),
        "rows": rows.words,
        "tokens": result.verified.tokens,
        "candidates": found,
    }


def _coded(layers: Sequence[Quantised]) -> list[Quantised]:
    """Without those that are only rounded to the dtype of all that has no codes."""
    return [each for each in layers if each.grid is not None]


@contextmanager
def _put(model: Any, layers: Iterable[Quantised]) -> Iterator[Any]:
    with walk.changed(model, layers):
        yield model


@dataclass(frozen=True)
class _Calibrated:
    """A model whose layers are calibrated behind one another, as a folder is written."""

    built: Any
    source: WeightSource
    rows: Sequence[Batch]
    device: torch.device

    def layers(self, plan: Plan) -> Mapping[str, Quantised]:
        """Path -> linear layer in the scheme of the plan."""
        rows = self.rows if any(scheme.calibrates for scheme in plan.values()) else []
        layers = walk.layers(
            self.built,
            self.source,
            choice(plan),
            rows=rows,
            device=self.device,
            field=LADDER,
        )
        return {each.linear.path: each for layer in layers for each in layer}


def _check(result: Found, budget: float, steps: Sequence[Scheme]) -> None:
    most, measured = at_most(result.verified), result.verified
    if not most <= budget:
        few = measured.change.value <= budget
        raise refusal(
            BUDGET,
            budget,
            f"{steps[0].name} everywhere already costs up to {most:.3%} on the rows it is verified on"
            + (f", of which {measured.tokens:,} tokens say no more than that" if few else ""),
            allowed="a larger budget, or a wider scheme first",
            instead=f"more held-out rows ({ROWS}): {tokens_needed(measured, budget):,} tokens to verify on"
            if few
            else f"{BUDGET}={2 * most:.3g}",
        )


def _increase(measured: Measured) -> dict[str, float]:
    """Of the perplexity, relative."""
    return {"mean": math.expm1(measured.change.value), "at_most": at_most(measured)}


def of_folder(
    model: Any, reference: Any, *, rows: Sequence[Batch], results: Mapping[str, Any]
) -> dict[str, Any]:
    """The results with those of the folder that was written, whose model this is."""
    measured = measure(reference, model, rows)
    stored = results["candidates"][-1]["bytes"]
    row = table.row("as written", measured, stored=stored, layers=[])
    return {**results, "written": _increase(measured), "candidates": [*results["candidates"], row]}


def comment(results: Mapping[str, Any]) -> str:
    """What a plan's file says of it."""
    verified, written = results["verified"], results["written"]
    return (
        f"perplexity {verified['mean']:+.3%} (at most {verified['at_most']:+.3%}) on the rows it was "
        f"verified on, {results['tokens']:,} tokens;\nas written {written['mean']:+.3%} (at most "
        f"{written['at_most']:+.3%}) on others; budget {results['budget']:.3%}\nrows: {results['rows']}"
    )
