"""How a run ended, written down: its end, the failure that ended it, the rank that hung."""

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
"""How long a rank that ran out of time waits for the stacks of the others."""
_OTHERS_S = 1.0
"""How long rank 0 waits for the reports of others: what it sees may follow from their failure."""


def record_hang(run_dir: RunDir, *, world_size: int, step: int) -> None:
    """Of the ranks that have run out of time, the first that is able to writes down which rank the others waited for."""
    time.sleep(_STACKS_S)  # all run out of time at nearly the same moment
    if log.rank() != next(iter(failure.hung_ranks(run_dir.failures)), None):
        time.sleep(_STACKS_S)
        return
    first = failure.record_root_cause(run_dir.failures, world_size=world_size)
    _log.error("first failure: %s", first)
    with contextlib.suppress(UserError, OSError):
        record_failed(run_dir.path, reason=str(first), step=step)


def record_failure(error: BaseException, *, run_dir: RunDir, world_size: int, began: float, step: int) -> None:
    """This rank's report; on rank 0 the run's, which names the rank that failed first. A new run that did nothing but refuse leaves nothing."""
    refused = isinstance(error, UserError)
    nothing_done = refused and run_dir.created and step == run_dir.step
    if nothing_done and log.rank() != 0:
        time.sleep(_OTHERS_S)  # rank 0 refuses the same, as a rule, and has removed the directory by then
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
    first = None if interrupted else failure.record_root_cause(run_dir.failures, world_size=world_size)
    reason = str(first) if first and first.rank else f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if first and first.rank:
        _log.error("first failure: %s", first)
    status, reason = ("interrupted", "stopped by Ctrl-C while it started") if interrupted else ("failed", reason)
    with contextlib.suppress(UserError):  # on a full disk the reason for the end must not be lost over the summary
        run_dir.update_summary(status=status, exit_reason=reason, wall_s=time.monotonic() - began)
        run_dir.append_event(status, step=step, detail=reason)


def record_end(end: Progress, *, status: str, why: str, run_dir: RunDir, seconds: float) -> None:
    """The run's last word, on rank 0."""
    from hybridtrain.training import metrics

    run_dir.update_summary(status=status, steps=end.step, tokens=end.tokens_seen, exit_reason=why, wall_s=seconds)
    run_dir.append_event(status, step=end.step, detail=why)
    again = "" if status == "finished" else f" ({why}); the same command goes on from there"
    words = "finished" if not again else "stopped after"
    _log.info("%s %d step%s in %s; run directory %s%s", words, end.step, "" if end.step == 1 else "s", metrics.duration(seconds), run_dir.path, again)
