"""The content of a run directory: metrics by column, summary, events, config.

Also of running, failed and queued runs.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hybridtrain.config import compose, schema
from hybridtrain.errors import UserError, refusal
from hybridtrain.report import benchmarks, compared, samples
from hybridtrain.report.numerics import Numerics, of_lines
from hybridtrain.run.record import METRICS, read_machine, read_summary, require_run
from hybridtrain.runtime import failure
from hybridtrain.runtime.files import LARGEST, number, one_line

KEYS = (*METRICS, "eval_loss")
STARTS = ("started", "resumed")
_LAST_TIME = 2.0**40
"""Largest Unix time that can be shown as a date."""
SILENT_S = 600.0
"""Seconds (and 20 times the usual interval) without log lines after which a run may have been killed."""


@dataclass(frozen=True)
class History:
    """A run, from its files."""

    folder: Path
    name: str
    columns: Mapping[str, np.ndarray]
    """KEYS -> one float64 per line of metrics.jsonl, in the order of their steps; NaN for null or missing."""
    summary: Mapping[str, Any]
    """summary.json; empty if there is none."""
    events: list[dict[str, Any]]
    """Lines of events.jsonl in the order of their times."""
    config: schema.Config | None
    """config.yaml; None if there is none or it cannot be read."""
    failure: str
    """Root cause of the newest attempt of a failed run; else empty."""
    hosts: list[dict[str, Any]]
    """machine.json: one dict per host."""
    numerics: Numerics | None
    """numerics.jsonl; None without a sample."""
    samples: list[samples.Sample]
    """samples.jsonl."""
    scores: list[benchmarks.Scores]
    """lm_eval.jsonl."""
    compared: compared.Cells
    """compare.json."""
    unread: Mapping[str, int]
    """File -> number of its lines that could not be read and are left out."""

    def __len__(self) -> int:
        return len(self.columns["step"])

    def known(self, key: str) -> np.ndarray:
        """The finite values of `key`."""
        values = self.columns[key]
        return values[np.isfinite(values)]

    def last(self, key: str) -> float | None:
        """The last finite value of `key`."""
        values = self.known(key)
        return float(values[-1]) if len(values) else None

    @property
    def status(self) -> str:
        return str(self.summary.get("status") or "unknown")

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.last("step") or self.summary.get("steps") or 0)

    @property
    def total_steps(self) -> int:
        """Steps that the run is to do; 0 if not known."""
        return int(self.summary.get("total_steps") or (self.config.train.steps if self.config else 0))

    @property
    def tokens_per_s(self) -> float | None:
        """Median over all lines, which pauses hardly change."""
        values = self.known("tokens_per_s")
        return float(np.median(values)) if len(values) else None

    @property
    def eta_s(self) -> float | None:
        """Seconds to the end of a running run, at the speed of the last 20 lines."""
        paces = self.known("step_time_s")[-20:]
        if self.status != "running" or not len(paces) or not self.total_steps:
            return None
        return max(0, self.total_steps - self.step) * float(np.mean(paces))

    @property
    def silent_s(self) -> float | None:
        """Seconds since the last log line of a running run, if it has been silent so long that it may
        have been killed; else None."""
        times = self.known("time")
        if self.status != "running" or not len(times):
            return None
        usual = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
        age = time.time() - float(times[-1])
        return age if age > max(SILENT_S, 20 * usual) else None

    @cached_property
    def seconds(self) -> np.ndarray:
        """Training time in seconds at each line, without the time between the end of an attempt
        and the next start.
        """
        times, starts = (
            self.columns["time"],
            [event["time"] for event in self.events if event["kind"] in STARTS],
        )
        if not len(times):
            return times
        spent = np.diff(times, prepend=min(starts[0], times[0]) if starts else times[0])
        for start in starts[1:]:
            first = int(np.searchsorted(times, start))
            if first < len(times):
                spent[first] = min(spent[first], times[first] - start)
        # If the clock was set back, use the time of the steps.
        steps = np.diff(self.columns["step"], prepend=0.0) * np.nan_to_num(self.columns["step_time_s"])
        return np.cumsum(np.where(spent < 0, np.maximum(steps, 0.0), spent))

    @property
    def wall_s(self) -> float | None:
        """Training time in seconds, over all attempts."""
        return (
            float(self.seconds[-1])
            if len(self) and math.isfinite(self.seconds[-1])
            else self.summary.get("wall_s")
        )


def read(folder: Path) -> History:
    """Read a run directory, without a last line that is still being written.

    Raises UserError if it is no run.
    """
    require_run(folder, command="report")
    config, summary = _config(folder / "config.yaml"), read_summary(folder)
    run_name = compose.public(config)["run"]["name"] if config else ""
    columns, bad_rows = _columns(folder / "metrics.jsonl")
    events, bad_events = _events(folder / "events.jsonl")
    numerics, bad_samples = of_lines(_lines(folder / "numerics.jsonl"))
    texts, bad_texts = samples.of_lines(_lines(folder / "samples.jsonl"))
    bad = {"metrics.jsonl": bad_rows, "events.jsonl": bad_events, "numerics.jsonl": bad_samples}
    scores, bad_scores = benchmarks.of_lines(_lines(folder / "lm_eval.jsonl"))
    found, bad_compared = compared.of_lines(_lines(folder / "compare.json"))
    bad |= {"samples.jsonl": bad_texts, "lm_eval.jsonl": bad_scores, "compare.json": bad_compared}
    unread = {name: count for name, count in bad.items() if count}
    if not summary and (folder / "summary.json").exists():
        unread["summary.json"] = 1
    return History(
        folder=folder,
        name=one_line(run_name if run_name not in ("", compose.DEFAULT_NAME) else folder.resolve().name),
        columns=columns,
        summary=summary,
        events=events,
        config=config,
        failure=_failure(folder) if summary.get("status") == "failed" else "",
        hosts=read_machine(folder),
        numerics=numerics,
        samples=texts,
        scores=scores,
        compared=found,
        unread=unread,
    )


def _failure(folder: Path) -> str:
    with contextlib.suppress(OSError):  # another command may remove the file
        reports = sorted(
            folder.glob(f"failures/life-*/{failure.ROOT_CAUSE}"), key=lambda path: path.stat().st_mtime
        )
        return reports[-1].read_text(errors="replace") if reports else ""
    return ""


def _config(path: Path) -> schema.Config | None:
    """config.yaml; None if it cannot be read, e.g. is of another version or has an unset ${oc.env:...}."""
    try:
        return compose.read_run(path) if path.is_file() else None
    except UserError:
        return None


def _events(path: Path) -> tuple[list[dict[str, Any]], int]:
    """(events ordered by time, number of damaged lines)."""
    events, bad = [], 0
    for line in _lines(path):
        try:
            event = json.loads(line)
            at, step = number(event["time"]), number(event["step"])
            if at is None or step is None or not 0 <= at <= _LAST_TIME:
                raise ValueError("no time or no step")
            events.append(
                {
                    "time": float(at),
                    "step": int(step),
                    "kind": str(event["kind"]),
                    "detail": str(event["detail"]),
                }
            )
        except (ValueError, KeyError, TypeError, RecursionError):
            bad += line.endswith("\n")  # a line without its end is still being written
    return sorted(events, key=lambda event: event["time"]), bad


def _columns(path: Path) -> tuple[dict[str, np.ndarray], int]:
    """(key -> values of metrics.jsonl, number of damaged lines).

    Flat arrays: a million dicts would take a GiB.
    """
    columns, bad = {key: array("d") for key in KEYS}, 0
    for line in _lines(path):
        try:
            row = json.loads(line)
            numbers = [
                float(value) if type(value := row.get(key)) in (float, int) else math.nan for key in KEYS
            ]
            if not abs(numbers[0]) < LARGEST:
                raise ValueError("no step")
        except (ValueError, AttributeError, OverflowError, RecursionError):
            bad += line.endswith("\n")
            continue
        for column, value in zip(columns.values(), numbers, strict=True):
            column.append(value)
    arrays = {key: np.frombuffer(column, dtype=np.float64) for key, column in columns.items()}
    arrays = {key: np.where(np.abs(values) < LARGEST, values, np.nan) for key, values in arrays.items()}
    order = np.argsort(arrays["step"], kind="stable")
    return {key: values[order] for key, values in arrays.items()}, bad


def _lines(path: Path) -> Iterator[str]:
    """Lines of a text file with their newlines; none if there is no file.

    Raises UserError if it cannot be read.
    """
    try:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as stream:
            yield from stream
    except FileNotFoundError:
        return
    except OSError as error:
        raise refusal(
            "run.dir",
            path,
            f"it cannot be read: {error.strerror or error}",
            allowed="the folder of a run",
            instead="the run's own files",
        ) from error
