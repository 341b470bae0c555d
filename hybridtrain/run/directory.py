"""The run directory: the files in it that tools read, and the one process that writes them.

    runs/<name>/  config.yaml  summary.json  machine.json  metrics.jsonl  events.jsonl  lock  model/  checkpoints/  export/  report/  logs/

Everything here is for rank 0, which decides for all ranks; the others know the paths.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridtrain.errors import UserError, refusal
from hybridtrain.run import lock
from hybridtrain.runtime.files import append_json, discard, finite, number, read_json, read_object, unwritable, write_atomically, write_json, write_often

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

_REPEATED = ("checkpoint", "skipped", "empty")  # what happens again when a resume repeats their steps; starts and ends have happened all the same


@dataclass(frozen=True)
class RunDir:
    """A run's directory, opened for this command."""

    path: Path
    continued: bool
    """The directory held this run already."""
    checkpoint: Path | None
    """Newest complete checkpoint to go on from; None: start at step 0."""
    attempt: int
    """How often the run was started before."""
    created: bool
    """The run is new: what it writes was not there."""
    made: tuple[Path, ...]
    """Folders that this command made for it."""
    lost: str
    """How the attempt before ended, if it left no report; else empty."""
    changed: Mapping[str, tuple[object, object]]
    """section.field -> (before, now) of what the command changes in a continued run; none of it is identity."""
    step: int
    """Steps that are done when this attempt begins."""
    lock: lock.Lock | None
    """Rank 0's; None on the others."""
    summary: dict[str, Any]
    """Rank 0's; empty on the others."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "lock": None, "summary": {}}

    @property
    def model(self) -> Path:
        """Where the model's Hugging Face config belongs, for exports."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def failures(self) -> Path:
        """What failed in this attempt."""
        return self.path / "failures" / f"life-{self.attempt}"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    def append_metrics(self, values: Mapping[str, object]) -> None:
        """Add one line. Keys of METRICS that `values` lacks, and numbers that are not finite, are null. Raises UserError on a full disk."""
        self.check()
        _append(self.metrics, {**dict.fromkeys(METRICS), **values})

    def append_event(self, kind: str, *, step: int, detail: str) -> None:
        """Add one line of EVENTS that happened now, when `step` steps were done. Raises UserError on a full disk."""
        self.check()
        append_event(self.path, kind, step=step, detail=detail)

    def check(self) -> None:
        """Raise UserError if another process has taken the run over: nothing may be written any more."""
        if self.lock is not None:
            self.lock.check()

    def cut(self, step: int) -> None:
        """Keep metrics and events up to `step`, atomically, so that no step stands twice after a resume; a line torn by a kill goes too.

        The summary takes over what the last of the metrics says: a command that finds nothing left to do must not lose it. Raises UserError.
        """
        for file in (self.metrics, self.events):
            try:
                if not file.is_file():
                    continue
                kept = [line for line in file.read_text(errors="replace").splitlines() if _stands(line, step=step)]
                write_atomically(file, "".join(line + "\n" for line in kept))
            except OSError as error:
                raise unwritable("run.dir", self.path, error) from error
            if kept and file == self.metrics:
                last = json.loads(kept[-1])
                self.update_summary(final_loss=last.get("loss"), tokens_per_s=last.get("tokens_per_s"))

    def update_summary(self, **values: object) -> None:
        """Write summary.json again, atomically, with these keys of SUMMARY changed. Raises UserError on a full disk.

        A new status is on the disk when this returns; mere progress, which metrics.jsonl has too, does not wait for it.
        """
        assert set(values) <= set(SUMMARY), f"not in a summary: {set(values) - set(SUMMARY)}"
        self.check()
        self.summary.update(values)
        assert self.summary["status"] in STATUSES, self.summary["status"]
        try:
            text = json.dumps(finite(self.summary), indent=1, allow_nan=False) + "\n"
            (write_atomically if "status" in values else write_often)(self.path / "summary.json", text)
        except OSError as error:
            raise unwritable("run.dir", self.path, error) from error

    def close(self) -> None:
        """Give the lock back; the run's last word has been written."""
        if self.lock is not None:
            self.lock.release()

    def undo(self) -> None:
        """Remove what a new run has written by now, and the folders made for it: nothing was trained. Files of others stay."""
        assert self.created, self.path
        for name in (
            "config.yaml",
            "summary.json",
            "events.jsonl",
            "machine.json",
            "branch.json",
            "deepspeed.json",
            "model/config.json",
            "model/generation_config.json",
        ):
            discard(self.path / name)
        for pattern in ("logs/rank-*.log", "failures/life-0/*", "model/tokenizer"):
            for path in self.path.glob(pattern):
                discard(path)
        self.close()
        remove_folders((*self.made, *(self.path / name for name in ("failures", "failures/life-0", "logs", "model"))))


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
    aged = []
    with contextlib.suppress(OSError):
        for file in path.parent.glob("*/summary.json"):
            with contextlib.suppress(OSError):
                aged.append((file.stat().st_mtime, file.parent))
    return f"hybridtrain {command} {max(aged)[1]}" if aged else f"hybridtrain runs, then hybridtrain {command} RUN"


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


def make_folders(path: Path) -> tuple[Path, ...]:
    """Create a folder and its parents; returns those that are new. Raises UserError."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()][::-1]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remove_folders(tuple(missing))
        raise unwritable("run.dir", path, error) from error
    return tuple(missing)


def remove_folders(made: tuple[Path, ...]) -> None:
    for folder in reversed(made):
        with contextlib.suppress(OSError):  # somebody else uses it by now
            folder.rmdir()


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
    _append(path / "events.jsonl", {"time": time.time(), "step": step, "kind": kind, "detail": detail})


def _append(file: Path, values: Mapping[str, object]) -> None:
    try:
        append_json(file, values)
    except OSError as error:
        raise unwritable("run.dir", file.parent, error) from error


def attempts(path: Path) -> int:
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


def _stands(line: str, *, step: int) -> bool:
    """Whether a line of metrics.jsonl or events.jsonl still holds after a resume at `step`; a torn one does not."""
    try:
        values = json.loads(line)
        return values["step"] <= step or values.get("kind", _REPEATED[0]) not in _REPEATED
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
