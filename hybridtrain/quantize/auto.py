"""quantize.plan=auto: a plan, measured on rows that it was not searched on, beside uniform schemes."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hybridtrain.errors import refusal
from hybridtrain.models.init import WeightSource
from hybridtrain.quantize import joined, schemes, table, walk
from hybridtrain.quantize.experts import key
from hybridtrain.quantize.measure import Measured, measure
from hybridtrain.quantize.plan import Plan, choice
from hybridtrain.quantize.schemes import Scheme
from hybridtrain.quantize.search import Found, search
from hybridtrain.quantize.walk import Quantised
from hybridtrain.types import Batch

LADDER, BUDGET, ROWS = "quantize.ladder", "quantize.budget", "quantize.eval_rows"
_FEWEST = 4  # rows of each set


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


def split(held_out: Sequence[Batch]) -> tuple[Sequence[Batch], Sequence[Batch]]:
    """(rows to verify a plan on, rows to report it on). Raises UserError for too few."""
    if len(held_out) < 2 * _FEWEST:
        problem = f"{len(held_out)} held-out micro-batches are too few to verify a plan and to report it"
        raise refusal(
            ROWS, len(held_out), problem, allowed="8 micro-batches or more", instead="more held-out rows"
        )
    return held_out[0::2], held_out[1::2]


def found(
    reference: Any,
    built: Any,
    source: WeightSource,
    steps: Sequence[Scheme],
    *,
    budget: float,
    calibration: Sequence[Batch],
    verify: Sequence[Batch],
    report: Sequence[Batch],
    plan_of: Callable[[Scheme], Plan],
    one: bool,
) -> tuple[Plan, dict[str, Any]]:
    """(plan, results: a table of it and of uniform schemes on a third set of rows).

    `plan_of`: the plan of one scheme for all; raises UserError for one that does not fit. `one`: whether
    layers that read the same input have one scheme. Raises UserError if no plan keeps the budget.
    """
    uniform = {
        scheme.name: _uniform(built, source, scheme, calibration, reference, plan_of) for scheme in steps
    }
    first = next(iter(uniform.values()))
    together = joined.sets(reference, [each.linear for each in first.values()], calibration[0], joined=one)
    candidates = joined.candidates(list(uniform.values()), together)
    few = calibration[: max(1, 8 // len(calibration[0].input_ids_BT))]
    result = search(reference, candidates, budget=budget, rows=few, verify=verify)
    _check(result, budget, steps)
    other = copy.deepcopy(reference)
    rows = []
    chosen = {path: uniform[result.plan[key(each.linear)].name][path] for path, each in first.items()}
    for name, layers in {**uniform, "plan": chosen}.items():
        values = list(layers.values())
        with walk.changed(other, values):
            measured = measure(reference, other, report)
        rows.append(table.row(name, measured, stored=table.stored_bytes(reference, values), layers=values))
    return result.plan, {
        "budget": budget,
        "steps": result.steps,
        "undone": result.undone,
        "expected_kl": result.expected,
        "verified": _increase(result.verified),
        "candidates": rows,
    }


def _uniform(
    built: Any,
    source: WeightSource,
    scheme: Scheme,
    calibration: Sequence[Batch],
    reference: Any,
    plan_of: Callable[[Scheme], Plan],
) -> Mapping[str, Quantised]:
    """Path -> linear layer, of a model in one scheme."""
    plan = plan_of(scheme)
    rows = calibration if scheme.calibrates else []
    layers = walk.layers(
        built,
        source,
        choice(plan),
        rows=rows,
        device=reference.device,
        field=LADDER,
    )
    return {each.linear.path: each for layer in layers for each in layer}


def _check(result: Found, budget: float, steps: Sequence[Scheme]) -> None:
    most = result.verified.most
    if not most <= budget:
        raise refusal(
            BUDGET,
            budget,
            f"{steps[0].name} everywhere already costs up to {most:.3%} on the rows it is verified on",
            allowed="a larger budget, or a wider scheme first",
            instead=f"{BUDGET}={2 * most:.3g}, or more held-out rows ({ROWS})",
        )


def _increase(measured: Measured) -> dict[str, float]:
    """Of the perplexity, relative."""
    return {"mean": math.expm1(measured.change.value), "at_most": measured.most}


def of_folder(
    model: Any, reference: Any, *, rows: Sequence[Batch], results: Mapping[str, Any]
) -> dict[str, Any]:
    """The results with those of the folder that was written, whose model this is: its layers are calibrated
    behind one another, and all else has its dtype.
    """
    measured = measure(reference, model, rows)
    stored = results["candidates"][-1]["bytes"]
    row = table.row("as written", measured, stored=stored, layers=[])
    return {**results, "written": _increase(measured), "candidates": [*results["candidates"], row]}


def comment(results: Mapping[str, Any]) -> str:
    """What a plan's file says of it."""
    verified, written = results["verified"], results["written"]
    return (
        f"perplexity {verified['mean']:+.3%} (at most {verified['at_most']:+.3%}) on the rows it was "
        f"verified on;\nas written {written['mean']:+.3%} (at most {written['at_most']:+.3%}) on others; "
        f"budget {results['budget']:.3%}"
    )
