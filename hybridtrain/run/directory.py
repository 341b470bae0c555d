"""The run directory: the files in it, and the one process that writes them. What they say is in record.py.

    runs/<name>/  config.yaml  summary.json  machine.json  metrics.jsonl  events.jsonl  lock  model/  checkpoints/  export/  report/  logs/

Everything here is for rank 0, which decides for all ranks; the others know the paths.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridtrain.run import lock
from hybridtrain.run.record import METRICS, STATUSES, SUMMARY, append_event, append_line
from hybridtrain.runtime.files import discard, finite, unwritable, write_atomically, write_unsynced

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
    new_folders: tuple[Path, ...]
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
        append_line(self.metrics, {**dict.fromkeys(METRICS), **values})

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
                kept = [line for line in file.read_text(errors="replace").splitlines() if _is_current(line, step=step)]
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
            (write_atomically if "status" in values else write_unsynced)(self.path / "summary.json", text)
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
        remove_folders((*self.new_folders, *(self.path / name for name in ("failures", "failures/life-0", "logs", "model"))))


def make_folders(path: Path) -> tuple[Path, ...]:
    """Create a folder and its parents; returns those that are new. Raises UserError."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()][::-1]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remove_folders(tuple(missing))
        raise unwritable("run.dir", path, error) from error
    return tuple(missing)


def remove_folders(new_folders: tuple[Path, ...]) -> None:
    for folder in reversed(new_folders):
        with contextlib.suppress(OSError):  # somebody else uses it by now
            folder.rmdir()


def _is_current(line: str, *, step: int) -> bool:
    """Whether a line of metrics.jsonl or events.jsonl still holds after a resume at `step`; a torn one does not."""
    try:
        values = json.loads(line)
        return values["step"] <= step or values.get("kind", _REPEATED[0]) not in _REPEATED
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
