"""The run directory: its files, and the one process that may write them. Their contents are in record.py.

    runs/<name>/  config.yaml  summary.json  machine.json  metrics.jsonl  numerics.jsonl  samples.jsonl
                  events.jsonl  lock  model/  checkpoints/  export/  report/  logs/

Only rank 0 calls what reads or writes here, on behalf of all ranks; the other ranks use the paths alone.
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

# Events that a resume repeats; starts and ends are kept.
_REPEATED = ("checkpoint", "skipped", "empty", "loss_scale")


@dataclass(frozen=True)
class RunDir:
    """A run's directory, opened by this command."""

    path: Path
    continued: bool
    """The directory already held this run."""
    checkpoint: Path | None
    """Newest complete checkpoint, to resume from; None: start at step 0."""
    attempt: int
    """How often the run was started before."""
    created: bool
    """The run is new: none of its files existed."""
    new_folders: tuple[Path, ...]
    """Folders that this command created for the run."""
    lost: str
    """How the previous attempt ended if it did not record that itself; else empty."""
    changed: Mapping[str, tuple[object, object]]
    """section.field -> (old, new) of the options that differ in a continued run; none is
    part of its identity."""
    kept: Mapping[str, object]
    """section.field -> value: options that stay at an earlier version's default (migrate.kept)."""
    step: int
    """Steps done when this attempt begins."""
    lock: lock.Lock | None
    """On rank 0; None on the others."""
    summary: dict[str, Any]
    """On rank 0; empty on the others."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "lock": None, "summary": {}}

    @property
    def model(self) -> Path:
        """Folder of the model's Hugging Face config, for exports."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def failures(self) -> Path:
        """Folder of this attempt's failure reports."""
        return self.path / "failures" / f"life-{self.attempt}"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def numerics(self) -> Path:
        return self.path / "numerics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    def append_metrics(self, values: Mapping[str, object]) -> None:
        """Append a line to metrics.jsonl.

        Missing keys of METRICS and numbers that are not finite become null. Raises UserError on a full disk.
        """
        self.check()
        append_line(self.metrics, {**dict.fromkeys(METRICS), **values})

    def append_numerics(self, values: Mapping[str, object]) -> None:
        """Append a line to numerics.jsonl (precision/numerics.py). Raises UserError on a full disk."""
        self.check()
        append_line(self.numerics, values)

    def append_samples(self, values: Mapping[str, object]) -> None:
        """Append a line to samples.jsonl (training/samples.py). Raises UserError on a full disk."""
        self.check()
        append_line(self.samples, values)

    def append_event(self, kind: str, *, step: int, detail: str) -> None:
        """Append an event of now to events.jsonl: `kind` is one of EVENTS, `step` the steps done.

        Raises UserError on a full disk.
        """
        self.check()
        append_event(self.path, kind, step=step, detail=detail)

    def check(self) -> None:
        """Raise UserError if another process has taken over the run: this one must not write any more."""
        if self.lock is not None:
            self.lock.check()

    def truncate(self, step: int) -> None:
        """Remove metrics, numerics, samples and events after `step`, atomically, so that no step occurs twice
        after a resume.

        An incomplete last line is removed too. Loss and speed of the last line kept go to the summary, where
        they would be missing if no step is left to train. Raises UserError.
        """
        for file in (self.metrics, self.numerics, self.samples, self.events):
            try:
                if not file.is_file():
                    continue
                kept = [
                    line
                    for line in file.read_text(errors="replace").splitlines()
                    if _is_current(line, step=step)
                ]
                write_atomically(file, "".join(line + "\n" for line in kept))
            except OSError as error:
                raise unwritable("run.dir", self.path, error) from error
            if kept and file == self.metrics:
                last = json.loads(kept[-1])
                self.update_summary(final_loss=last.get("loss"), tokens_per_s=last.get("tokens_per_s"))

    def update_summary(self, **values: object) -> None:
        """Rewrite summary.json atomically with new values of keys of SUMMARY.

        Raises UserError on a full disk. Waits for the disk (fsync) only with a new status: everything else
        is in metrics.jsonl too.
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
        """Release the lock. Nothing is written afterwards."""
        if self.lock is not None:
            self.lock.release()

    def undo(self) -> None:
        """Remove what a new run has written so far, and the folders created for it. Other files stay.

        For a command that is refused before training starts.
        """
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
        # a new run has found no trackers/ here
        for pattern in ("logs/rank-*.log", "failures/life-0/*", "model/tokenizer", "trackers"):
            for path in self.path.glob(pattern):
                discard(path)
        self.close()
        remove_folders(
            (
                *self.new_folders,
                *(self.path / name for name in ("failures", "failures/life-0", "logs", "model")),
            )
        )


def make_folders(path: Path) -> tuple[Path, ...]:
    """Create a folder and its parents; returns those that did not exist. Raises UserError."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()][::-1]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remove_folders(tuple(missing))
        raise unwritable("run.dir", path, error) from error
    return tuple(missing)


def remove_folders(new_folders: tuple[Path, ...]) -> None:
    for folder in reversed(new_folders):
        with contextlib.suppress(OSError):  # not empty: it holds files of others
            folder.rmdir()


def _is_current(line: str, *, step: int) -> bool:
    """Whether a line of metrics.jsonl, numerics.jsonl, samples.jsonl or events.jsonl is kept by a resume at
    `step`; an incomplete one is not.
    """
    try:
        values = json.loads(line)
        return values["step"] <= step or values.get("kind", _REPEATED[0]) not in _REPEATED
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
