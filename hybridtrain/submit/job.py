"""What the job script does before and after training, on the first node. No torch.

python -m hybridtrain.submit.job open key=value ...     compose and check the config, unless `submit` has done
                                                        so;
                                                        prints the run directory, then arguments for training
python -m hybridtrain.submit.job close RUN --code N --stopped WHY   exit code 0: done, 75: requeue, else:
                                                                    failed
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

from hybridtrain.errors import UserError, refusal
from hybridtrain.run import lock, start
from hybridtrain.run.holder import requeues
from hybridtrain.run.record import read_summary, record_lost
from hybridtrain.runtime import failure
from hybridtrain.runtime.files import read_object, unwritable, write_json
from hybridtrain.submit import attempts, script, slurm

REQUEUE_CODE = 75  # EX_TEMPFAIL
RUN = "HYBRIDTRAIN_RUN"
PLUGINS = "HYBRIDTRAIN_PLUGINS"


def open_job(argv: list[str]) -> int:
    """Print the run directory of this job, then run.plugins as an argument for training.

    The directory is the one that `submit` created, else the one that the overrides `argv` resume or create.
    """
    try:
        run, words = _submitted_run(), os.environ.get(PLUGINS, "")
        if run is None:
            from hybridtrain.submit import create

            with contextlib.redirect_stdout(sys.stderr):  # the script reads stdout, and plugins may print
                run, plugins = create.create_run_from_overrides(argv)
            words = script.plugins_word(plugins)
        if (holder := lock.holder_elsewhere(run)) is not None:
            raise lock.in_use(run, by=holder)
        job, restart = _this_attempt()
        attempts.begin(
            run,
            chain=os.environ.get("HYBRIDTRAIN_CHAIN") or job,
            job=job,
            restart=restart,
            nodes=os.environ["SLURM_JOB_NODELIST"],
        )
        if lost := start.lost_attempt(run, holder=lock.read(run)):
            record_lost(run, lost=lost, step=read_summary(run).get("steps") or 0)
        set_summary(run, status="queued", exit_reason=None)
    except UserError as error:
        with contextlib.suppress(OSError):
            print(f"hybridtrain submit: {error}", file=sys.stderr)
        return 2
    print(run)
    print(words)
    return 0


def _print(text: object) -> None:
    """Print to the job's output; a full disk must not change the exit code."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def _this_attempt() -> tuple[str, int]:
    """Job id, and how often Slurm has requeued the job."""
    return os.environ["SLURM_JOB_ID"], requeues()


def _submitted_run() -> Path | None:
    """The run directory that `submit` created for this job, or for this task of an array; None
    if it created none.
    """
    if listed := os.environ.get("HYBRIDTRAIN_RUNS"):
        try:
            return Path(
                os.fsdecode(Path(listed).read_bytes().splitlines()[int(os.environ["SLURM_ARRAY_TASK_ID"])])
            )
        except (OSError, IndexError) as error:
            problem = f"it does not name the run of task {os.environ['SLURM_ARRAY_TASK_ID']} ({error})"
            raise refusal(
                "HYBRIDTRAIN_RUNS",
                listed,
                problem,
                allowed="the list that submit wrote",
                instead="hybridtrain submit again",
            ) from error
    return Path(os.environ[RUN]) if os.environ.get(RUN) else None


def close_job(run: Path, *, code: int, stopped: str) -> int:
    """Record and print how this attempt ended; the exit code tells the script whether to requeue the job."""
    outcome = _outcome(run, code=code, stopped=stopped)
    job, restart = _this_attempt()
    all_attempts, saved = attempts.end(run, job=job, restart=restart, outcome=outcome)
    most = int(os.environ.get("HYBRIDTRAIN_MAX_RESTARTS") or 3)
    decision, why = attempts.decide(all_attempts, max_restarts=most)
    if decision == attempts.REQUEUE and not saved and restart >= most:  # failures cannot be counted
        decision, limit = attempts.FAILED, f"cluster.max_restarts={most}"
        why = (
            f"lives.json cannot be written, and after {restart} restarts ({limit}) "
            "the number of failures is not known"
        )
    _print(f"{outcome}: {why}")
    if decision == attempts.DONE:
        return 0
    if decision == attempts.REQUEUE:
        bad = _bad_nodes(run)
        if bad and _resubmit(run, without=bad, chain=all_attempts[-1].chain):
            return code or 1
        return REQUEUE_CODE
    return code or 1


def _outcome(run: Path, *, code: int, stopped: str) -> str:
    """Outcome of this attempt, for `Attempt.outcome`.

    A failure is also written to first.txt and summary.json.
    """
    status = read_summary(run).get("status")
    if status == "finished" and code == 0:
        return "finished"
    if stopped == "cancelled" or status == "interrupted":
        if stopped == "cancelled":
            _record_end(run, status="interrupted", reason="the job was cancelled")
        return "cancelled"
    if status == "preempted" or stopped == "signal":
        return "preempted"
    folder = _newest_failures(run)
    first = (
        failure.record_root_cause(folder, world_size=int(os.environ["HYBRIDTRAIN_WORLD"])) if folder else None
    )
    bad = _bad_nodes(run)
    unfit = ", ".join(f"{node} ({why})" for node, why in bad.items())
    reason = (
        str(first) if first else f"not fit: {unfit}" if bad else f"exit code {code}, no rank left a report"
    )
    _print(f"first failure: {reason}\n{first.detail if first else ''}")
    _record_end(run, status="failed", reason=reason)
    return "failed"


def _record_end(run: Path, *, status: str, reason: str) -> None:
    """Record in summary.json how the run ended, unless another process trains in the directory and
    this job was refused.
    """
    if (holder := lock.holder_elsewhere(run)) is not None:
        _print(f"{run} is not changed: {holder} trains there")
        return
    try:
        set_summary(run, status=status, exit_reason=reason)
    except UserError as error:  # a full disk must not change the exit code
        _print(error)


def _newest_failures(run: Path) -> Path | None:
    """Folder with the failure reports of this attempt; None if no rank left one."""
    job, restart = _this_attempt()
    started = attempts.started_at(run, job=job, restart=restart)
    folders = [path for path in (run / "failures").glob("life-*") if path.stat().st_mtime >= started]
    return max(folders, key=lambda path: path.stat().st_mtime, default=None)


def _bad_nodes(run: Path) -> dict[str, str]:
    """Nodes that the health check of this attempt refused -> the reason."""
    file, (job, restart) = run / "submit" / "bad_nodes.json", _this_attempt()
    if not file.is_file() or file.stat().st_mtime < attempts.started_at(run, job=job, restart=restart):
        return {}
    try:
        return {str(node): str(why) for node, why in read_object(file, field="run.dir").items()}
    except UserError:
        return {}


def _resubmit(run: Path, *, without: dict[str, str], chain: str) -> bool:
    """Submit a new job that excludes the bad nodes (a running job cannot change its nodes); returns
    whether it is queued.
    """
    script = run / "submit" / "job.sbatch"
    if not script.is_file() or os.environ.get("SLURM_ARRAY_TASK_ID"):
        return False
    before = [os.environ["SLURM_JOB_EXC_NODES"]] if os.environ.get("SLURM_JOB_EXC_NODES") else []
    exclude = ",".join(
        dict.fromkeys(
            [*filter(None, os.environ.get("HYBRIDTRAIN_EXCLUDE", "").split(",")), *before, *without]
        )
    )
    environment = {**os.environ, "HYBRIDTRAIN_CHAIN": chain, "HYBRIDTRAIN_EXCLUDE": exclude}
    for name in [
        name for name in environment if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF"
    ]:
        del environment[name]
    try:
        new = slurm.queued_id(
            slurm.ask("sbatch", "--parsable", f"--exclude={exclude}", str(script), env=environment)
        )
        (run / "submit" / "job_id").write_text(new + "\n")
    except (UserError, OSError) as error:
        _print(f"sbatch without {exclude}: {error}")
        return False
    _print(f"job {new} takes over, without {exclude}")
    return True


def set_summary(run: Path, **values: object) -> None:
    """Change keys of summary.json while no training process runs. Raises UserError on a full disk."""
    try:
        write_json(run / "summary.json", {**read_summary(run), **values})
    except OSError as error:
        raise unwritable("run.dir", run, error) from error


def main(argv: list[str]) -> int:
    if argv[:1] == ["open"]:
        return open_job(argv[1:])
    parser = argparse.ArgumentParser()
    parser.add_argument("close", choices=["close"])
    parser.add_argument("run", type=Path)
    parser.add_argument("--code", type=int, required=True)
    parser.add_argument("--stopped", required=True)
    given = parser.parse_args(argv)
    return close_job(given.run, code=given.code, stopped=given.stopped)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
