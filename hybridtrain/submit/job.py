"""What the job script does beside training, on the first node; the standard library and our checks, no torch.

python -m hybridtrain.submit.job open key=value ...          compose and check, unless `submit` has; prints the run directory, then words for training
python -m hybridtrain.submit.job close RUN --code N --stopped WHY    the verdict: exit code 0 done, 75 requeue, else failed
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

from hybridtrain.errors import UserError, refusal
from hybridtrain.run import entry as entries
from hybridtrain.run import lock
from hybridtrain.run.record import read_summary, record_lost
from hybridtrain.runtime import failure
from hybridtrain.runtime.files import read_object, unwritable, write_json
from hybridtrain.submit import lives, script, slurm

REQUEUE_CODE = 75  # EX_TEMPFAIL
RUN = "HYBRIDTRAIN_RUN"
PLUGINS = "HYBRIDTRAIN_PLUGINS"


def open_job(argv: list[str]) -> int:
    """Print the run directory of this job: the one that `submit` minted, or the one that these overrides resume or create; then run.plugins as an argument for training."""
    try:
        run, words = _given_run(), os.environ.get(PLUGINS, "")
        if run is None:
            from hybridtrain.submit import mint

            with contextlib.redirect_stdout(sys.stderr):  # what is printed below is read by the script; a user's module may print, too
                run, plugins = mint.mint_from(argv)
            words = script.plugins_word(plugins)
        if (holder := lock.holder_elsewhere(run)) is not None:
            raise lock.held(run, by=holder)
        job, life = _this_life()
        lives.begin(run, chain=os.environ.get("HYBRIDTRAIN_CHAIN") or job, job=job, life=life, nodes=os.environ["SLURM_JOB_NODELIST"])
        if lost := entries.lost_attempt(run, holder=lock.read(run)):
            record_lost(run, lost=lost, step=read_summary(run).get("steps") or 0)
        set_summary(run, status="queued", exit_reason=None)
    except UserError as error:
        with contextlib.suppress(OSError):
            print(f"hybridtrain submit: {error}", file=sys.stderr)
        return 2
    print(run)
    print(words)
    return 0


def _say(text: object) -> None:
    """To the job's output, which may stand on a full disk: the verdict comes all the same."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def _this_life() -> tuple[str, int]:
    """The job, and how often Slurm has requeued it."""
    return os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def _given_run() -> Path | None:
    """The minted run: of this job, or of this task of an array."""
    if listed := os.environ.get("HYBRIDTRAIN_RUNS"):
        try:
            return Path(os.fsdecode(Path(listed).read_bytes().splitlines()[int(os.environ["SLURM_ARRAY_TASK_ID"])]))
        except (OSError, IndexError) as error:
            problem = f"it does not name the run of task {os.environ['SLURM_ARRAY_TASK_ID']} ({error})"
            raise refusal("HYBRIDTRAIN_RUNS", listed, problem, allowed="the list that submit wrote", instead="hybridtrain submit once more") from error
    return Path(os.environ[RUN]) if os.environ.get(RUN) else None


def close_job(run: Path, *, code: int, stopped: str) -> int:
    """Say how this life ended, and whether there is another."""
    outcome = _outcome(run, code=code, stopped=stopped)
    job, life = _this_life()
    known, kept = lives.end(run, job=job, life=life, outcome=outcome)
    most = int(os.environ.get("HYBRIDTRAIN_MAX_RESTARTS") or 3)
    decision, why = lives.verdict(known, max_restarts=most)
    if decision == lives.REQUEUE and not kept and life >= most:  # nothing counts failures any more
        decision, why = lives.FAILED, f"lives.json cannot be written, and after {life} restarts (cluster.max_restarts={most}) nobody knows how often it failed"
    _say(f"{outcome}: {why}")
    if decision == lives.DONE:
        return 0
    if decision == lives.REQUEUE:
        bad = _bad_nodes(run)
        if bad and _replaced(run, without=bad, chain=known[-1].chain):
            return code or 1
        return REQUEUE_CODE
    return code or 1


def _outcome(run: Path, *, code: int, stopped: str) -> str:
    """What became of this life; a failure is written where people look for it."""
    status = read_summary(run).get("status")
    if status == "finished" and code == 0:
        return "finished"
    if stopped == "cancelled" or status == "interrupted":
        if stopped == "cancelled":
            _note(run, status="interrupted", reason="the job was cancelled")
        return "cancelled"
    if status == "preempted" or stopped == "signal":
        return "preempted"
    folder = _newest_failures(run)
    first = failure.conclude(folder, world_size=int(os.environ["HYBRIDTRAIN_WORLD"])) if folder else None
    bad = _bad_nodes(run)
    reason = str(first) if first else f"not fit: {', '.join(f'{node} ({why})' for node, why in bad.items())}" if bad else f"exit code {code}, no rank said why"
    _say(f"first failure: {reason}\n{first.detail if first else ''}")
    _note(run, status="failed", reason=reason)
    return "failed"


def _note(run: Path, *, status: str, reason: str) -> None:
    """Record how the run ended. Not if another process trains in the directory, since this job was refused then."""
    if (holder := lock.holder_elsewhere(run)) is not None:
        _say(f"{run} is left as it is: {holder} trains there")
        return
    try:
        set_summary(run, status=status, exit_reason=reason)
    except UserError as error:  # the verdict comes all the same
        _say(error)


def _newest_failures(run: Path) -> Path | None:
    """Reports of this life alone: a rank that never came so far leaves none."""
    job, life = _this_life()
    started = lives.began(run, job=job, life=life)
    folders = [path for path in (run / "failures").glob("life-*") if path.stat().st_mtime >= started]
    return max(folders, key=lambda path: path.stat().st_mtime, default=None)


def _bad_nodes(run: Path) -> dict[str, str]:
    """Nodes that the health check of this life refused, with the reason."""
    file, (job, life) = run / "submit" / "bad_nodes.json", _this_life()
    if not file.is_file() or file.stat().st_mtime < lives.began(run, job=job, life=life):
        return {}
    try:
        return {str(node): str(why) for node, why in read_object(file, field="run.dir").items()}
    except UserError:
        return {}


def _replaced(run: Path, *, without: dict[str, str], chain: str) -> bool:
    """Submit the job anew without bad nodes (a running job cannot change its own); whether that worked."""
    script = run / "submit" / "job.sbatch"
    if not script.is_file() or os.environ.get("SLURM_ARRAY_TASK_ID"):
        return False
    before = [os.environ["SLURM_JOB_EXC_NODES"]] if os.environ.get("SLURM_JOB_EXC_NODES") else []
    exclude = ",".join(dict.fromkeys([*filter(None, os.environ.get("HYBRIDTRAIN_EXCLUDE", "").split(",")), *before, *without]))
    environment = {**os.environ, "HYBRIDTRAIN_CHAIN": chain, "HYBRIDTRAIN_EXCLUDE": exclude}
    for name in [name for name in environment if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF"]:
        del environment[name]
    try:
        new = slurm.queued(slurm.ask("sbatch", "--parsable", f"--exclude={exclude}", str(script), env=environment))
        (run / "submit" / "job_id").write_text(new + "\n")
    except (UserError, OSError) as error:
        _say(f"sbatch without {exclude}: {error}")
        return False
    _say(f"job {new} takes over, without {exclude}")
    return True


def set_summary(run: Path, **values: object) -> None:
    """Change keys of summary.json while no rank 0 is there to do it. Raises UserError on a full disk."""
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
