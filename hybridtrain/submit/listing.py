"""`hybridtrain runs` and `hybridtrain logs`: a table of runs, and the log of one."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridtrain.config.schema import LogsRoot, RunsRoot
from hybridtrain.errors import UserError, refusal
from hybridtrain.run import lock
from hybridtrain.run.record import NO_REPORT, read_summary, require_run
from hybridtrain.runtime.files import one_line, read_object
from hybridtrain.submit import attempts, slurm

_MOST_BYTES = 1 << 20
"""How much of a log's end is read to print its last lines."""

_COLUMNS = ("run", "status", "step", "loss", "tokens/s", "checkpoint", "job", "state", "reason")
_ENDED = ("finished", "failed", "preempted", "interrupted")


def runs(config: RunsRoot) -> int:
    """Print one line per run directory, the newest last; for an unreadable one the line
    names the damaged file.
    """
    folder = Path(config.runs.folder)
    summaries = _by_age(folder.glob("*/summary.json"))
    if not summaries:
        raise refusal(
            "runs.folder",
            folder,
            "there is no run in it",
            allowed="a folder of run directories",
            instead="runs.folder=FOLDER",
        )
    rows = [_read(path.parent) for path in summaries]
    states, trouble = _states([run.job for run in rows if run.job])
    table = [_COLUMNS, *(run.row(states) for run in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(_COLUMNS))]
    lines = [
        "  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    print("\n".join(lines), flush=True)
    if trouble:
        print(f"states of jobs are not shown: {trouble}", file=sys.stderr)
    return 0


def _by_age(files: Iterable[Path]) -> list[Path]:
    """The files that still exist, the newest last."""
    aged = []
    for file in files:
        with contextlib.suppress(OSError):
            aged.append((file.stat().st_mtime, file))
    return [file for _, file in sorted(aged)]


def _states(jobs: list[str]) -> tuple[dict[str, str], str]:
    """(job id -> state, why states are missing or "")."""
    try:
        return slurm.states(jobs), ""
    except UserError as error:
        return {}, str(error).splitlines()[0]


@dataclass(frozen=True)
class _Run:
    """A row of the table, from as much of a run directory as could be read."""

    name: str
    job: str
    cells: tuple[str, ...]
    """status, step, loss, tokens/s and checkpoint."""
    reason: str

    def row(self, states: Mapping[str, str]) -> tuple[str, ...]:
        return (self.name, *self.cells, self.job or "-", states.get(self.job) or "-", self.reason)


def _read(run: Path) -> _Run:
    try:
        if not (summary := read_summary(run)):
            read_object(run / "summary.json", field="run.dir")  # raises the reason
        if _is_lost(run, summary):
            summary = {**summary, "status": "failed", "exit_reason": NO_REPORT}
        return _Run(
            one_line(run.name),
            attempts.job_id(run),
            _cells(run, summary),
            _short(one_line(str(summary.get("exit_reason") or ""))),
        )
    except UserError as error:
        problem = str(error).splitlines()[0].partition("=")[2].removeprefix(f"{run}/")
        return _Run(one_line(run.name), "", ("unreadable", "-", "-", "-", "-"), one_line(problem))


def _is_lost(run: Path, summary: Mapping[str, Any]) -> bool:
    """Whether the status is running although the process that holds the run's lock is dead."""
    return summary.get("status") == "running" and lock.alive(run) is False


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _cells(run: Path, summary: Mapping[str, Any]) -> tuple[str, ...]:
    loss, speed = summary.get("final_loss"), summary.get("tokens_per_s")
    return (
        one_line(str(summary.get("status"))),
        f"{summary.get('steps') or 0}/{summary.get('total_steps') or '?'}",
        f"{loss:.4f}" if loss is not None else "-",
        f"{speed:.0f}" if speed is not None else "-",
        str(attempts.newest_step(run) or "-"),
    )


def logs(config: LogsRoot) -> int:
    """Print the last lines of the log of rank 0 and, with logs.follow, new lines until the run has ended."""
    run = Path(config.run.dir)
    require_run(run, command="logs")
    file = _newest_log(run)
    if file is None:
        raise refusal(
            "run.dir",
            run,
            "nothing has been logged there",
            allowed="the folder of a run that has begun",
            instead="hybridtrain runs",
        )
    position = _end_of(file, lines=config.logs.lines)
    while config.logs.follow:
        ended = _has_ended(run)
        position = _more(file, position)
        newer = _newest_log(run)
        if newer not in (None, file):
            file, position = newer, _more(newer, 0)  # type: ignore[assignment, arg-type]
        elif ended:
            break
        time.sleep(0.5)
    return 0


def _end_of(file: Path, *, lines: int) -> int:
    """Print the last lines of a file, or that it is empty; returns its size in bytes."""
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - _MOST_BYTES))
            text = stream.read().decode(errors="replace")
    except OSError as error:
        raise refusal(
            "run.dir",
            file,
            f"it cannot be read: {error.strerror or error}",
            allowed="a log of the run",
            instead="hybridtrain runs",
        ) from error
    print("\n".join(text.splitlines()[-lines:]) if text.strip() else f"{file} is empty so far", flush=True)
    return size


def _newest_log(run: Path) -> Path | None:
    """For a job the newest log of its first node, which also has launch errors; else the log of rank 0."""
    nodes = _by_age(run.glob("logs/job-*/life-*/node-0.log"))
    own = run / "logs" / "rank-0.log"
    return nodes[-1] if nodes else own if own.is_file() else None


def _more(file: Path, position: int) -> int:
    """Print the file from byte `position` on; returns its new size.

    A truncated or new file is printed from the start.
    """
    try:
        with file.open("rb") as stream:
            position = position if position <= stream.seek(0, os.SEEK_END) else 0
            stream.seek(position)
            new = stream.read()
    except OSError:
        return 0
    print(new.decode(errors="replace"), end="", flush=True)
    return position + len(new)


def _has_ended(run: Path) -> bool:
    """Whether the log is final; a run that will be requeued has not ended."""
    summary = read_summary(run)
    status = summary.get("status")
    return _is_lost(run, summary) or (
        status in _ENDED
        and not (status == "preempted" and (run / "submit" / "lives.json").exists() and not _is_over(run))
    )


def _is_over(run: Path) -> bool:
    """Whether no attempt follows the newest one of a preempted run."""
    try:
        all_attempts = attempts.read(run)
    except UserError:
        return True
    return bool(all_attempts) and all_attempts[-1].outcome == "cancelled"
