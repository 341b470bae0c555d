"""The files of a run directory that describe the run: summary.json,
metrics.jsonl, events.jsonl, machine.json.
"""

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
"""Keys of every line of metrics.jsonl; a line may have more, such as eval_loss."""
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
"""Keys of summary.json. The hardware is in machine.json, one entry per host (runtime/host.py)."""
_NUMBERS = (
    "steps",
    "total_steps",
    "tokens",
    "final_loss",
    "wall_s",
    "tokens_per_s",
    "world_size",
    "parameters",
)
EVENTS = (
    "started",
    "resumed",
    "checkpoint",
    "skipped",
    "empty",
    "loss_scale",
    "precision",
    "nonfinite",
    "spike",
    "rollback",
    "preempted",
    "interrupted",
    "finished",
    "failed",
)
"""Kinds of events. A line of events.jsonl is {time, step, kind, detail}: time in seconds since 1970,
step = steps done."""
STATUSES = ("queued", "running", "finished", "preempted", "interrupted", "failed")
"""preempted: by the scheduler, which starts it again; interrupted: by a person. Earlier versions
wrote preempted for both."""
NO_REPORT = "ended without a report"


def read_summary(path: Path) -> dict[str, Any]:
    """summary.json of a run directory; empty if it is missing or unreadable.

    Values of a wrong type are left out.
    """
    try:
        summary = read_object(path / "summary.json", field="run.dir")
    except UserError:
        return {}
    return {key: value for key, value in summary.items() if value is None or _is_sound(key, value)}


def _is_sound(key: str, value: object) -> bool:
    if key in _NUMBERS:
        return number(value) is not None
    return key not in SUMMARY or isinstance(value, dict if key == "versions" else str)


_RUN_FILES = ("config.yaml", "summary.json", "metrics.jsonl")
"""A folder with one of them is a run directory."""


def require_run(path: Path, *, command: str) -> None:
    """Raise UserError for a folder that is no run directory; it suggests `command` with the latest run
    in the parent folder.
    """
    if any((path / name).exists() for name in _RUN_FILES):
        return
    problem = (
        f"there is no {', '.join(_RUN_FILES[:-1])} or {_RUN_FILES[-1]} in it"
        if path.is_dir()
        else "it is a file"
        if path.exists()
        else "there is no such folder"
    )
    raise refusal(
        "run.dir",
        path,
        problem,
        allowed="the folder of a run",
        instead=_suggest_sibling(path, command=command),
    )


def _suggest_sibling(path: Path, *, command: str) -> str:
    by_age = []
    with contextlib.suppress(OSError):
        for file in path.parent.glob("*/summary.json"):
            with contextlib.suppress(OSError):
                by_age.append((file.stat().st_mtime, file.parent))
    return (
        f"hybridtrain {command} {max(by_age)[1]}"
        if by_age
        else f"hybridtrain runs, then hybridtrain {command} RUN"
    )


def write_machine(path: Path, hosts: Sequence[Mapping[str, Any]]) -> None:
    """Write machine.json, one entry per host. Raises UserError on a full disk.

    A file of its own, because summary.json is rewritten at every log line.
    """
    try:
        write_json(path / "machine.json", hosts)
    except OSError as error:
        raise unwritable("run.dir", path, error) from error


def read_machine(path: Path) -> list[dict[str, Any]]:
    """machine.json of a run directory, one entry per host; earlier versions had it in summary.json.

    Empty if there is none.
    """
    try:
        hosts = read_json(path / "machine.json", field="run.dir")
    except UserError:
        hosts = read_summary(path).get("machine")
    entries = [host for host in hosts if isinstance(host, dict)] if isinstance(hosts, list) else []
    return [
        {**host, "ranks": [rank for rank in _list_or_empty(host.get("ranks")) if isinstance(rank, int)]}
        for host in entries
    ]


def _list_or_empty(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def record_lost(path: Path, *, lost: str, step: int) -> None:
    """Append the event of an attempt that ended without recording how."""
    append_event(path, "failed", step=step, detail=lost)


def record_failed(path: Path, *, reason: str, step: int) -> None:
    """Record in summary and events why an attempt failed; any rank may call this. Raises UserError."""
    try:
        write_json(path / "summary.json", {**read_summary(path), "status": "failed", "exit_reason": reason})
    except OSError as error:
        raise unwritable("run.dir", path, error) from error
    append_event(path, "failed", step=step, detail=reason)


def record_finished(path: Path, *, step: int, tokens: int) -> None:
    """Record that a run is finished whose last attempt saved the final checkpoint but ended before
    recording it. Raises UserError.
    """
    why = "reached the end"
    try:
        write_json(
            path / "summary.json",
            {**read_summary(path), "status": "finished", "steps": step, "tokens": tokens, "exit_reason": why},
        )
    except OSError as error:
        raise unwritable("run.dir", path, error) from error
    append_event(path, "finished", step=step, detail=why)


def append_event(path: Path, kind: str, *, step: int, detail: str) -> None:
    """Append an event of now to events.jsonl: `kind` is one of EVENTS, `step` the steps done.

    Raises UserError on a full disk.
    """
    assert kind in EVENTS, kind
    append_line(path / "events.jsonl", {"time": time.time(), "step": step, "kind": kind, "detail": detail})


def append_line(file: Path, values: Mapping[str, object]) -> None:
    """Append a line of JSON to a file of a run. Raises UserError on a full disk."""
    try:
        append_json(file, values)
    except OSError as error:
        raise unwritable("run.dir", file.parent, error) from error


def count_attempts(path: Path) -> int:
    """Number of starts recorded in events.jsonl."""
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
