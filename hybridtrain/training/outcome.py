"""Records how an attempt ended: finished, failed, or with a rank that hangs."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from hybridtrain.errors import UserError
from hybridtrain.run.record import record_failed
from hybridtrain.runtime import failure, log
from hybridtrain.types import Progress

if TYPE_CHECKING:
    from hybridtrain.run.directory import RunDir


_log = log.get("train")
_STACKS_S = 3.0
"""How long a rank that timed out waits for the stacks of the others."""
_OTHERS_S = 1.0
"""How long rank 0 waits for the reports of other ranks: its own error may be secondary to theirs."""


def record_hang(run_dir: RunDir, *, world_size: int, step: int) -> None:
    """Record which rank the others waited for. Of the ranks that timed out, the lowest writes it."""
    time.sleep(_STACKS_S)  # all ranks time out at nearly the same time
    if log.rank() != next(iter(failure.hung_ranks(run_dir.failures)), None):
        time.sleep(_STACKS_S)
        return
    root_cause = failure.record_root_cause(run_dir.failures, world_size=world_size)
    _log.error("first failure: %s", root_cause)
    with contextlib.suppress(UserError, OSError):
        record_failed(run_dir.path, reason=str(root_cause), step=step)


def record_failure(
    error: BaseException, *, run_dir: RunDir, world_size: int, start_s: float, step: int
) -> None:
    """Write this rank's failure report; on rank 0 also the run's, which names the rank that failed first.

    Removes the directory of a new run that ends with a UserError before its first step.
    """
    refused = isinstance(error, UserError)
    nothing_done = refused and run_dir.created and step == run_dir.step
    if nothing_done and log.rank() != 0:
        time.sleep(_OTHERS_S)  # rank 0 usually raises the same error, and removes the directory
        if not (run_dir.path / "config.yaml").exists():
            return
    if nothing_done and log.rank() == 0:
        run_dir.undo()
        return
    failure.record(run_dir.failures, rank=log.rank(), step=step, error=error)
    if not refused:
        _log.error("ended by %s: %s", type(error).__name__, error)
    if log.rank() != 0:
        return
    interrupted = isinstance(error, KeyboardInterrupt)
    time.sleep(0.0 if refused or interrupted else _OTHERS_S)
    root_cause = None if interrupted else failure.record_root_cause(run_dir.failures, world_size=world_size)
    reason = (
        str(root_cause)
        if root_cause and root_cause.rank
        else f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    )
    if root_cause and root_cause.rank:
        _log.error("first failure: %s", root_cause)
    status, reason = (
        ("interrupted", "stopped by Ctrl-C while it started") if interrupted else ("failed", reason)
    )
    with contextlib.suppress(UserError):  # a full disk must not replace the original error
        run_dir.update_summary(status=status, exit_reason=reason, wall_s=time.monotonic() - start_s)
        run_dir.append_event(status, step=step, detail=reason)


def record_end(end: Progress, *, status: str, reason: str, run_dir: RunDir, seconds: float) -> None:
    """Record the end of an attempt in summary, events and log, on rank 0."""
    from hybridtrain.training import metrics

    run_dir.update_summary(
        status=status, steps=end.step, tokens=end.tokens_seen, exit_reason=reason, wall_s=seconds
    )
    run_dir.append_event(status, step=end.step, detail=reason)
    whole = status == "finished" and reason == "reached the end"
    again = "" if status == "finished" else "; the same command goes on from there"
    hint = "" if whole else f" ({reason}){again}"
    verb = "finished" if status == "finished" else "stopped after"
    _log.info(
        "%s %d step%s in %s; run directory %s%s",
        verb,
        end.step,
        "" if end.step == 1 else "s",
        metrics.duration(seconds),
        run_dir.path,
        hint,
    )
