"""Starts an attempt of a run: the directory is chosen, created if needed, and locked before anything
in it is written.

lock_run (choose, lock)  ->  LockedRun  ->  begin (config.yaml, summary.json): a RunDir,
or leave (no changes)
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hybridtrain.config import migrate
from hybridtrain.config.schema import Config
from hybridtrain.errors import UserError
from hybridtrain.run import identity, lock
from hybridtrain.run.directory import RunDir, make_folders, remove_folders
from hybridtrain.run.holder import Holder
from hybridtrain.run.record import NO_REPORT, SUMMARY, count_attempts, read_summary
from hybridtrain.runtime import failure, host, launch, log
from hybridtrain.runtime.files import unwritable, write_atomically

_log = log.get("run")
_APPEAR_S = 5.0
"""Seconds that the config.yaml of another new run may take to appear after its lock."""


@dataclass(frozen=True)
class LockedRun:
    """A run directory that this process has locked; nothing but the lock has been written yet."""

    path: Path
    before: Config | None
    """Config of the last attempt of the run in it; None: a new run."""
    kept: Mapping[str, object]
    """section.field -> value: options that stay at an earlier version's default (migrate.kept)."""
    lock: lock.Lock
    new_folders: tuple[Path, ...]
    """Folders that were created for the run, outermost first."""
    lost: str
    """How the last attempt ended, if it left no report; else empty."""

    def leave(self) -> None:
        """Release the lock and remove the folders that were created."""
        self.lock.release()
        remove_folders(self.new_folders)


def lock_run(config: Config) -> LockedRun:
    """Choose the directory of the run (identity.choose), create it if needed, and lock it. Sets the options
    of `config` that an earlier version's run keeps.

    Raises UserError for what `choose` refuses, if another process trains in the directory, or if
    it cannot be written.
    """
    until = time.monotonic() + _APPEAR_S
    while True:
        choice = identity.choose(config)
        holder, new_folders = lock.read(choice.path), make_folders(choice.path)
        try:
            run_lock = lock.acquire(choice.path, takeover=config.run.takeover)
        except UserError:
            remove_folders(new_folders)
            if choice.before is None and time.monotonic() < until:  # another new run started at the same time
                time.sleep(0.05)
                continue
            raise
        second = identity.choose(config)
        if second.path == choice.path:
            break
        run_lock.release()
        remove_folders(new_folders)
    if second.differing:
        _log.info(
            "%s holds another run (%s): this one is in %s",
            config.run.dir or Path("runs") / config.run.name,
            second.differing,
            second.path,
        )
    if file := os.environ.get(launch.RUN_DIR_FILE):
        Path(file).write_text(str(second.path))
    kept = migrate.kept(second.before, config) if second.before else {}
    migrate.keep(config, kept)
    return LockedRun(
        second.path,
        second.before,
        kept,
        run_lock,
        new_folders,
        lost_attempt(second.path, holder=holder) if second.before else "",
    )


def begin(
    locked: LockedRun,
    config: Config,
    *,
    yaml_text: str,
    versions: Mapping[str, str],
    checkpoint: Path | None,
    step: int,
) -> RunDir:
    """Write config.yaml (`yaml_text`) and summary.json with status running; the directory is now this run's.

    Raises UserError. `checkpoint`, `step`: where this attempt starts.
    """
    path, before = locked.path, locked.before
    try:
        write_atomically(path / "config.yaml", yaml_text)
    except OSError as error:
        raise unwritable("run.dir", path, error) from error
    attempt = count_attempts(path)
    run = RunDir(
        path=path,
        continued=before is not None and (attempt > 0 or not (path / "submit").exists()),
        checkpoint=checkpoint,
        attempt=attempt,
        created=before is None,
        new_folders=locked.new_folders,
        lost=locked.lost,
        changed=identity.changes(before, config) if before else {},
        kept=locked.kept,
        step=step,
        lock=locked.lock,
        summary={**dict.fromkeys(SUMMARY), "versions": dict(versions), "git_revision": _git_revision()},
    )
    run.update_summary(status="running")
    return run


def lost_attempt(path: Path, *, holder: Holder | None) -> str:
    """How the last attempt ended, if summary.json still has status running; else empty.

    `holder`: the process in the lock file.
    """
    summary = read_summary(path)
    if summary.get("status") != "running":
        return ""
    size, attempt = summary.get("world_size"), max(0, count_attempts(path) - 1)
    first = failure.root_cause(
        path / "failures" / f"life-{attempt}", world_size=size if isinstance(size, int) else 0
    )
    by = f" ({holder}, since {holder.when})" if holder else ""
    return f"the attempt before{by} {NO_REPORT}{f'; {first}' if first else ''}"


def _git_revision() -> str | None:
    """The git commit of this code, with "-dirty" if there are local changes; None outside a checkout."""
    checkout = host.PACKAGE.parent
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
