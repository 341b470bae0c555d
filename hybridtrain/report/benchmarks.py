"""lm_eval.jsonl of a run, and its table in the page: the scores of each task, newest first."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hybridtrain.report import page
from hybridtrain.runtime.files import number

_ERROR = "_stderr"


@dataclass(frozen=True)
class Scores:
    """What the harness measured after `step` steps; None: of a model of another origin."""

    step: int | None
    limit: int
    scores: Mapping[str, Mapping[str, float]]
    """Task -> metric -> value."""


def of_lines(lines: Iterable[str]) -> tuple[list[Scores], int]:
    """(scores in the order of the file, number of damaged lines)."""
    found, bad = [], 0
    for line in lines:
        try:
            values = json.loads(line)
            step = values["step"] if values["step"] is None else int(values["step"])
            scores = {
                str(task): {
                    str(name): float(value) for name, value in metrics.items() if number(value) is not None
                }
                for task, metrics in values["scores"].items()
            }
            found.append(Scores(step, int(values["limit"]), scores))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            bad += line.endswith("\n")  # a line without its end is still being written
    return found, bad


def section(found: Sequence[Scores]) -> str:
    """A row for each task and metric, with its standard error; empty without any."""
    rows = [
        (task, name, f"{value:.4f}{_error(metrics, name)}", _step(each), each.limit or "all")
        for each in reversed(found)
        for task, metrics in each.scores.items()
        for name, value in metrics.items()
        if _ERROR not in name
    ]
    return page.table(("task", "metric", "value", "step", "examples"), rows, numbers=(2, 3, 4))


def _step(each: Scores) -> str:
    return "" if each.step is None else f"{each.step:,}"


def _error(metrics: Mapping[str, float], name: str) -> str:
    metric, comma, kept = name.partition(",")
    error = metrics.get(f"{metric}{_ERROR}{comma}{kept}")
    return "" if error is None else f" ± {error:.4f}"
