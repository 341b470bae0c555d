"""What the files of a run say of it: its summary, its events, its machine."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridtrain.errors import UserError, refusal
from hybridtrain.runtime.files import append_json, number, read_json, read_object, unwritable, write_json

METRICS = (
    "step",
    "tokens_seen",
    "loss",
    "grad_norm",
    "lr",
    "loss_scale",
    "skipped",
    "tokens_per_s",
    "tokens_per_s_per_device",
    "step_time_s",
    "mfu",
    "max_memory_gib",
    "time",
)
"""Keys of every line of metrics.jsonl; a line may have more (eval_loss)."""
SUMMARY = (
    "status",
    "steps",
    "total_steps",
    "tokens",
    "final_loss",
    "wall_s",
    "tokens_per_s",
    "layout",
    "world_size",
    "parameters",
    "exit_reason",
    "versions",
    "git_revision",
)
"""Keys of summary.json. What the run runs on stands in machine.json: one entry per host (runtime/host.py)."""
_NUMBERS = ("steps", "total_steps", "tokens", "final_loss", "wall_s", "tokens_per_s", "world_size", "parameters")
EVENTS = ("started", "resumed", "checkpoint", "skipped", "empty", "preempted", "interrupted", "finished", "failed")
"""Kinds of the lines of events.jsonl, {time, step, kind, detail}: time in seconds since 1970, step as done at that time."""
STATUSES = ("queued", "running", "finished", "preempted", "interrupted", "failed")
"""preempted: by the scheduler, and it goes on by itself; interrupted: by a person. Runs of earlier versions say preempted for both."""
NO_REPORT = "ended without a report"


def read_summary(path: Path) -> dict[str, Any]:
    """summary.json of a run directory; empty if there is none or it cannot be read. A value of another type than its key has is left out."""
    try:
        summary = read_object(path / "summary.json", field="run.dir")
    except UserError:
        return {}
    return {key: value for key, value in summary.items() if value is None or _is_sound(key, value)}


def _is_sound(key: str, value: object) -> bool:
    if key in _NUMBERS:
        return number(value) is not None
    return key not in SUMMARY or isinstance(value, dict if key == "versions" else str)


_TRACES = ("config.yaml", "summary.json", "metrics.jsonl")
"""A folder with one of them is a run's."""


def require_run(path: Path, *, command: str) -> None:
    """Refuse a folder that is no run's (raises UserError), naming the run beside it that was written to last for the same command."""
    if any((path / name).exists() for name in _TRACES):
        return
    problem = (
        f"there is no {', '.join(_TRACES[:-1])} or {_TRACES[-1]} in it" if path.is_dir() else "it is a file" if path.exists() else "there is no such folder"
    )
    raise refusal("run.dir", path, problem, allowed="the folder of a run", instead=_run_beside(path, command=command))


def _run_beside(path: Path, *, command: str) -> str:
    by_age = []
    with contextlib.suppress(OSError):
        for file in path.parent.glob("*/summary.json"):
            with contextlib.suppress(OSError):
                by_age.append((file.stat().st_mtime, file.parent))
    return f"hybridtrain {command} {max(by_age)[1]}" if by_age else f"hybridtrain runs, then hybridtrain {command} RUN"


def write_machine(path: Path, hosts: Sequence[Mapping[str, Any]]) -> None:
    """Write machine.json: one entry per host, apart from the summary, which is written at every log line. Raises UserError on a full disk."""
    try:
        write_json(path / "machine.json", hosts)
    except OSError as error:
        raise unwritable("run.dir", path, error) from error


def read_machine(path: Path) -> list[dict[str, Any]]:
    """One entry per host: machine.json of a run directory, or what an older summary.json says; empty where neither does."""
    try:
        hosts = read_json(path / "machine.json", field="run.dir")
    except UserError:
        hosts = read_summary(path).get("machine")
    entries = [host for host in hosts if isinstance(host, dict)] if isinstance(hosts, list) else []
    return [{**host, "ranks": [rank for rank in _listed(host.get("ranks")) if isinstance(rank, int)]} for host in entries]


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def record_lost(path: Path, *, lost: str, step: int) -> None:
    """Add the event of an attempt that ended without a report."""
    append_event(path, "failed", step=step, detail=lost)


def record_failed(path: Path, *, reason: str, step: int) -> None:
    """Note how an attempt failed, from whichever rank is able to: in the summary, and as an event. Raises UserError."""
    try:
        write_json(path / "summary.json", {**read_summary(path), "status": "failed", "exit_reason": reason})
    except OSError as error:
        raise unwritable("run.dir", path, error) from error
    append_event(path, "failed", step=step, detail=reason)


def record_finished(path: Path, *, step: int, tokens: int) -> None:
    """Note that a run is at its end: its last attempt had saved its last checkpoint, and could not say so. Raises UserError."""
    why = "reached the end"
    try:
        write_json(path / "summary.json", {**read_summary(path), "status": "finished", "steps": step, "tokens": tokens, "exit_reason": why})
    except OSError as error:
        raise unwritable("run.dir", path, error) from error
    append_event(path, "finished", step=step, detail=why)


def append_event(path: Path, kind: str, *, step: int, detail: str) -> None:
    """Add one line of EVENTS that happened now, when `step` steps were done. Raises UserError on a full disk."""
    assert kind in EVENTS, kind
    append_line(path / "events.jsonl", {"time": time.time(), "step": step, "kind": kind, "detail": detail})


def append_line(file: Path, values: Mapping[str, object]) -> None:
    """Add one line of JSON to a file of a run. Raises UserError on a full disk."""
    try:
        append_json(file, values)
    except OSError as error:
        raise unwritable("run.dir", file.parent, error) from error


def count_attempts(path: Path) -> int:
    """Starts that the events tell of."""
    try:
        lines = (path / "events.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        return 0
    return sum(_kind(line) in ("started", "resumed") for line in lines if '"kind"' in line)


def _kind(line: str) -> object:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event.get("kind") if isinstance(event, dict) else None
