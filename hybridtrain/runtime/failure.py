"""Finds the root cause of a failed run from the reports of its ranks.

    runs/<name>/failures/life-<n>/  rank-<r>.json     time, rank, node, step, error, traceback
                                    rank-<r>.stacks   stacks of all threads, of a rank that hangs
                                    first.txt         the root cause, see `record_root_cause`

life-<n> is attempt n of the run. Ranks that lose their peer fail, too, with a secondary error such as
"connection reset"; a killed rank leaves no report. No torch, because the job script uses this module.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import socket
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

_SECONDARY = re.compile(
    r"(RuntimeError|Dist\w+Error|Connection\w*Error|BrokenPipeError|TimeoutError): .*"
    r"(connection (closed|reset|refused|was)|broken pipe|tim(ed|e) ?out|remote process exited"
    r"|recv(Value|Vector)|nccl|gloo|TCPStore|socket)",
    re.IGNORECASE,
)
"""Errors of a rank that has lost a peer."""
ROOT_CAUSE = "first.txt"
_WAITING = ("torch/distributed/", "torch/utils/data", "threading.py")
"""Files in the innermost frames of a thread that waits."""


@dataclass(frozen=True)
class Failure:
    """The root cause of a failed run."""

    rank: int | None
    """None: no single rank."""
    node: str
    what: str
    """One line."""
    detail: str
    """Traceback or stacks; may be empty."""

    def __str__(self) -> str:
        who = "all ranks" if self.rank is None else f"rank {self.rank}"
        where = f" on {self.node}" if self.node else ""
        return f"{who}{where}: {self.what}"


def node() -> str:
    """This machine's name: Slurm's, else the host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def record(folder: Path, *, rank: int, step: int, error: BaseException) -> None:
    """Write this rank's report; never raises."""
    report = {
        "time": time.time(),
        "rank": rank,
        "node": node(),
        "step": step,
        "error": _line(_cause(error)),
        "traceback": "".join(traceback.format_exception(error)),
    }
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank-{rank}.json").write_text(json.dumps(report))


def is_secondary(error: BaseException) -> bool:
    """Whether `error` is the consequence of the failure of another rank, such as a closed connection."""
    return bool(_SECONDARY.match(_line(_cause(error))))


def is_timeout(error: BaseException) -> bool:
    """Whether a collective has waited too long for another rank."""
    return is_secondary(error) and bool(re.search("tim(ed|e) ?out", str(_cause(error)), re.IGNORECASE))


def _cause(error: BaseException) -> BaseException:
    """The innermost cause of an error: pipeline schedules wrap the error of a stage."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _line(error: BaseException) -> str:
    """Type and first line."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"


def root_cause(folder: Path, *, world_size: int) -> Failure | None:
    """The failure that caused the others; None if there are no reports.

    Primary errors count before hangs, these before silent ranks.
    """
    reports = sorted(_reports(folder), key=lambda report: report["time"])
    primary = [report for report in reports if not _SECONDARY.match(report["error"])]
    if primary:
        return _failure(primary[0])
    hung = {rank: text for rank in range(world_size) if (text := _stacks(folder / f"rank-{rank}.stacks"))}
    silent = [
        rank
        for rank in range(world_size)
        if rank not in hung and rank not in {report["rank"] for report in reports}
    ]
    busy = [rank for rank, text in hung.items() if not _is_waiting(text)]
    if hung and not busy and not silent and len(hung) > 1:
        what = (
            "they waited for each other longer than train.max_step_s: "
            "the network between them is cut, or they wait for different things"
        )
        return Failure(None, "", what, _by_place(hung))
    if busy or (hung and not silent):
        rank = busy[0] if busy else min(hung)
        return Failure(rank, "", "its step took longer than train.max_step_s", hung[rank])
    others = f" (as did {', '.join(map(str, silent[1:]))})" if silent[1:] else ""
    if hung:
        what = (
            f"it gave no sign of life{others} while the others waited for it longer than train.max_step_s: "
            "frozen, killed, or cut off from them"
        )
        return Failure(silent[0], "", what, f"rank {min(hung)} waited here:\n{hung[min(hung)]}")
    if reports and silent:
        return Failure(
            silent[0],
            "",
            f"it ended without a word{others}: killed from outside, or out of memory",
            reports[0]["traceback"],
        )
    return _failure(reports[0]) if reports else None


def of_lost_attempt(folder: Path) -> Failure | None:
    """`record_root_cause` of an attempt that has none yet.

    Its ranks are known by their files: each opens its .stacks at the start.
    """
    files = {
        int(match[1])
        for path in folder.glob("rank-*")
        if (match := re.fullmatch(r"rank-(\d{1,7})\.(stacks|json)", path.name))
    }
    if not files or (folder / ROOT_CAUSE).exists():
        return None
    return record_root_cause(folder, world_size=max(files) + 1)


def hung_ranks(folder: Path) -> list[int]:
    """Ranks that have written their stacks because a step took too long."""
    return sorted(
        int(match[1])
        for path in folder.glob("rank-*.stacks")
        if (match := re.fullmatch(r"rank-(\d{1,7})\.stacks", path.name)) and _stacks(path)
    )


def record_root_cause(folder: Path, *, world_size: int) -> Failure | None:
    """`root_cause`, also written to first.txt for people and for `hybridtrain report`."""
    found = root_cause(folder, world_size=world_size)
    if found:
        with contextlib.suppress(OSError):
            (folder / ROOT_CAUSE).write_text(f"{found}\n\n{found.detail}")
    return found


def _reports(folder: Path) -> list[dict]:
    """The valid reports in `folder`."""
    found = []
    for path in folder.glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            report = json.loads(path.read_text())
            if isinstance(report, dict) and _is_report(report):
                found.append(report)
    return found


def _is_report(report: dict) -> bool:
    texts = all(isinstance(report.get(name), str) for name in ("node", "error", "traceback"))
    when = report.get("time")
    return texts and type(report.get("rank")) is int and isinstance(when, int | float) and math.isfinite(when)


def _failure(report: dict) -> Failure:
    return Failure(report["rank"], report["node"], report["error"], report["traceback"])


def _stacks(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text(errors="replace")
    return ""


def _is_waiting(stacks: str) -> bool:
    """Whether the training thread waits for other ranks: one of its three innermost frames is in _WAITING."""
    return any(place in frame for frame in _frames(stacks)[:3] for place in _WAITING)


def _by_place(hung: dict[int, str]) -> str:
    """Stacks grouped by the place where ranks wait: those of one rank for each place."""
    places: dict[tuple[str, ...], list[int]] = {}
    for rank, text in hung.items():
        places.setdefault(tuple(_frames(text)), []).append(rank)
    few = [
        f"rank {', '.join(map(str, ranks[:8]))}{' ...' if ranks[8:] else ''} waited here:\n{hung[ranks[0]]}"
        for ranks in list(places.values())[:4]
    ]
    return "\n\n".join(few)


def _frames(stacks: str) -> list[str]:
    """Frames of the training thread, innermost first."""
    threads = [part for part in stacks.split("\n\n") if "hybridtrain/training/loop.py" in part]
    return [line for part in threads for line in part.splitlines() if line.lstrip().startswith("File ")]
