"""Tolerances, pass or fail, the table, and parity.json."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridtrain.config.schema import PrecisionConfig
from hybridtrain.errors import UserError
from hybridtrain.plan.formats import SCHEMES
from hybridtrain.precision.rules import names_of
from hybridtrain.runtime.files import read_object, write_json

if TYPE_CHECKING:
    from hybridtrain.parity.measure import Measurement, ReferenceResult

MEASURES = ("loss_rel", "grad_norm_rel", "grad_rel", "param_abs")
COLUMNS = ("layout", "engine", "precision", "passed", *MEASURES, "seconds")
"""Keys of one layout in parity.json."""
GRADIENT_FLOOR = 1e-6
"""Relative differences of a gradient are taken of its norm, but at least of this share of the global norm,
and of the whole of it if both gradients are smaller: those are noise."""

# (recipe, tp > 1) -> relative tolerance of loss, gradient norm and gradients; tolerance of parameters as a
# multiple of how far
# the steps move them. docs/parity.md has the measurements behind these numbers.
_TOLERANCES = {
    ("fp64", False): (1e-11, 1e-11, 1e-10, 0.05),
    ("fp64", True): (1e-11, 1e-11, 1e-10, 0.05),
    ("fp32", False): (1e-5, 1e-5, 1e-5, 0.05),
    ("fp32", True): (1e-5, 1e-5, 1e-5, 0.05),
    ("tf32", False): (1e-5, 1e-5, 1e-5, 0.05),
    ("tf32", True): (1e-5, 1e-5, 1e-5, 0.05),
    ("bf16_mixed", False): (1e-3, 2e-2, 1e-2, 2.0),
    ("bf16_mixed", True): (1e-3, 2e-2, 1e-1, 2.0),
    ("bf16_pure", False): (1e-3, 2e-2, 2e-2, 2.0),
    ("bf16_pure", True): (1e-3, 2e-2, 1e-1, 2.0),
    ("fp16_mixed", False): (5e-4, 5e-3, 2e-3, 2.0),
    ("fp16_mixed", True): (5e-4, 5e-3, 2e-2, 2.0),
}


_FORMAT_LOSS = 5e-3
_MORE_THAN_NOISE = 1.1
"""Sums in another order round some values the other way, and each moves those after it, up to as much as the
format itself changes."""


@dataclass(frozen=True)
class Row:
    """The result of one layout; `measured` is empty if it crashed."""

    layout: str
    engine: str
    processes: int
    precision: str
    tolerance: Mapping[str, float]
    """The largest difference that passes, per measure."""
    seconds: float
    measured: Mapping[str, float]
    worst: Mapping[str, str]
    """grad_rel and param_abs -> the parameter with the largest difference."""
    error: str

    @property
    def name(self) -> str:
        return self.layout if self.engine == "torch" else f"{self.layout} ({self.engine})"

    @property
    def exceeded(self) -> list[str]:
        """Measures above their tolerance; a missing value and NaN are above any tolerance."""
        return [
            name
            for name in MEASURES
            if (value := self.measured.get(name)) is None or not value <= self.tolerance[name]
        ]

    @property
    def passed(self) -> bool:
        return not self.error and not self.exceeded


def tolerances(precision: PrecisionConfig, *, tp: int, moved: float, noise: float) -> dict[str, float]:
    """The largest difference that passes, per measure.

    `moved`: about how far the steps move an element of a parameter. `noise`: ReferenceResult.noise.
    """
    loss, norm, gradient, moves = _TOLERANCES[precision.kind, tp > 1]
    if names := names_of(precision):
        first = gradient if names <= SCHEMES.keys() else _MORE_THAN_NOISE * noise  # equal weights round alike
        loss, norm, gradient, moves = _FORMAT_LOSS, 2 * noise, first, 2.0
    if precision.state != "auto":  # a difference in the last bit may change the code of a moment
        # in fp32, 5e-5 of the norm were measured after six steps, and 0.03 of what Adam can move
        norm, moves = max(norm, 2e-4), max(moves, 0.2)
    return dict(zip(MEASURES, (loss, norm, gradient, moves * moved), strict=True))


def _relative(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest |a - b| / |b| over the steps."""
    return largest(abs(a - b) / max(abs(b), 1e-30) for a, b in zip(ours, theirs, strict=True))


def largest(values: Iterable[float]) -> float:
    """The maximum, NaN if any is."""
    values = list(values)
    return math.nan if any(map(math.isnan, values)) else max(values)


def merge(
    ranks: Sequence[Measurement], reference: ReferenceResult
) -> tuple[dict[str, float], dict[str, str], str]:
    """The results of all ranks combined: the largest differences, the parameters that have them, and
    other problems as text.
    """
    measured = {
        "loss_rel": largest(_relative(rank.steps.losses, reference.steps.losses) for rank in ranks),
        "grad_norm_rel": largest(
            _relative(rank.steps.grad_norms, reference.steps.grad_norms) for rank in ranks
        ),
        "grad_rel": largest(rank.gradients.largest for rank in ranks),
        "param_abs": largest(rank.parameters.largest for rank in ranks),
    }
    worst = {
        "grad_rel": next(
            rank.gradients.name for rank in ranks if not rank.gradients.largest < measured["grad_rel"]
        ),
        "param_abs": next(
            rank.parameters.name for rank in ranks if not rank.parameters.largest < measured["param_abs"]
        ),
    }
    complaints = [
        f"{rank.steps.skipped} steps were skipped for a gradient that is not finite"
        for rank in ranks[:1]
        if rank.steps.skipped
    ]
    for what, expected, compared in (
        ("gradient", reference.gradients, set().union(*(rank.gradients.compared for rank in ranks))),
        ("parameter", reference.parameters, set().union(*(rank.parameters.compared for rank in ranks))),
    ):
        if expected != compared:
            complaints.append(f"{what}s that only one side has: {', '.join(sorted(expected ^ compared))}")
    return measured, worst, "\n".join(complaints)


def header(rows_tolerances: Mapping[str, Mapping[str, float]], *, width: int) -> str:
    """The first lines of the table: column names, and the tolerances with and without tp."""
    names = (
        f"{'layout':<{width}}  procs  {'loss_rel':>9}  {'grad_norm_rel':>13}  "
        f"{'grad_rel':>9}  {'param_abs':>9}  seconds  result"
    )
    return "\n".join(
        [
            names,
            *(
                f"{'at most, ' + kind:<{width}}         {_cells(values)}"
                for kind, values in rows_tolerances.items()
            ),
        ]
    )


def line(row: Row, *, width: int) -> str:
    """One row of the table, followed by the reasons if it failed."""
    result = "pass" if row.passed else "FAIL (error)" if row.error else f"FAIL ({', '.join(row.exceeded)})"
    text = f"{row.name:<{width}}  {row.processes:>5}  {_cells(row.measured)}  {row.seconds:>7.1f}  {result}"
    notes = [f"largest {name} at {row.worst[name]}" for name in row.exceeded if name in row.worst]
    notes += row.error.strip().splitlines()
    return "\n".join([text, *(f"    {note}" for note in notes)])


def _cells(values: Mapping[str, float]) -> str:
    return "  ".join(
        f"{format(values[name], '.1e') if name in values else '-':>{size}}"
        for name, size in zip(MEASURES, (9, 13, 9, 9), strict=True)
    )


def is_result(path: Path) -> bool:
    """Whether `write` wrote this file."""
    try:
        return {"reference", "layouts", "tolerances"} <= read_object(path, field="run.dir").keys()
    except UserError:
        return False


def write(path: Path, *, rows: list[Row], reference: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write parity.json atomically. NaN and infinities become null."""
    entries = []
    for row in rows:
        values = (
            row.layout,
            row.engine,
            row.precision,
            row.passed,
            *(row.measured.get(name) for name in MEASURES),
            round(row.seconds, 2),
        )
        entries.append(dict(zip(COLUMNS, values, strict=True)))
    content = {
        "reference": dict(reference),
        "layouts": entries,
        "tolerances": {row.name: dict(row.tolerance) for row in rows},
        "processes": {row.name: row.processes for row in rows},
        "errors": {row.name: row.error for row in rows if row.error},
        **facts,
    }
    write_json(path, content)
