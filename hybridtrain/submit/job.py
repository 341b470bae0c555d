"""What the job script does beside training, on the first node; the standard library and our checks, no torch.

python -m hybridtrain.submit.job open key=value ...          compose and check, unless `submit` has; prints the run directory
python -m hybridtrain.submit.job close RUN --code N --stopped WHY    the verdict: exit code 0 done, 75 requeue, else failed
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from hybridtrain import failure
from hybridtrain.files import write_atomically
from hybridtrain.rundir import read_summary
from hybridtrain.submit import lives
from hybridtrain.types import UserError

REQUEUE_CODE = 75  # EX_TEMPFAIL
RUN = "HYBRIDTRAIN_RUN"


def open_job(argv: list[str]) -> int:
    """Print the run directory of this job: the one that `submit` minted, or the one that these overrides continue or start."""
    run = _given_run()
    if run is None:
        from hybridtrain.submit import mint

        os.environ["WORLD_SIZE"] = os.environ["HYBRIDTRAIN_WORLD"]
        try:
            run = mint.mint_from(argv)
        except UserError as error:
            print(f"hybridtrain submit: {error}", file=sys.stderr)
            return 2
    job = os.environ["SLURM_JOB_ID"]
    again = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    lives.begin(run, chain=os.environ.get("HYBRIDTRAIN_CHAIN") or job, job=job, life=again, nodes=os.environ["SLURM_JOB_NODELIST"])
    set_summary(run, status="queued", exit_reason=None)
    print(run)
    return 0


def _given_run() -> Path | None:
    """The minted run: of this job, or of this task of an array."""
    if listed := os.environ.get("HYBRIDTRAIN_RUNS"):
        return Path(Path(listed).read_text().splitlines()[int(os.environ["SLURM_ARRAY_TASK_ID"])])
    return Path(os.environ[RUN]) if os.environ.get(RUN) else None


def close_job(run: Path, *, code: int, stopped: str) -> int:
    """Say how this life ended, and whether there is another."""
    outcome = _outcome(run, code=code, stopped=stopped)
    lives.end(run, outcome=outcome)
    known = lives.read(run)
    decision, why = lives.verdict(known, max_restarts=int(os.environ.get("HYBRIDTRAIN_MAX_RESTARTS") or 3))
    print(f"{outcome}: {why}", flush=True)
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
    if stopped == "cancelled":
        return "cancelled"
    if status == "preempted" or stopped == "signal":
        return "preempted"
    folder = _newest_failures(run)
    first = failure.conclude(folder, world_size=int(os.environ["HYBRIDTRAIN_WORLD"])) if folder else None
    bad = _bad_nodes(run)
    reason = str(first) if first else f"not fit: {', '.join(f'{node} ({why})' for node, why in bad.items())}" if bad else f"exit code {code}, no rank said why"
    print(f"first failure: {reason}\n{first.detail if first else ''}", flush=True)
    set_summary(run, status="failed", exit_reason=reason)
    return "failed"


def _newest_failures(run: Path) -> Path | None:
    """Reports of this life alone: a rank that never came so far leaves none."""
    started = lives.read(run)[-1].started
    folders = [path for path in (run / "failures").glob("life-*") if path.stat().st_mtime >= started]
    return max(folders, key=lambda path: path.stat().st_mtime, default=None)


def _bad_nodes(run: Path) -> dict[str, str]:
    """Nodes that the health check of this life refused, with the reason."""
    file = run / "submit" / "bad_nodes.json"
    if not file.is_file() or file.stat().st_mtime < lives.read(run)[-1].started:
        return {}
    return json.loads(file.read_text())


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
    done = subprocess.run(["sbatch", "--parsable", f"--exclude={exclude}", str(script)], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"sbatch without {exclude}: {done.stderr.strip()}", flush=True)
        return False
    new = done.stdout.strip().partition(";")[0]
    (run / "submit" / "job_id").write_text(new + "\n")
    print(f"job {new} takes over, without {exclude}", flush=True)
    return True


def set_summary(run: Path, **values: object) -> None:
    """Change keys of summary.json while no rank 0 is there to do it."""
    write_atomically(run / "summary.json", json.dumps({**read_summary(run), **values}, indent=1) + "\n")


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
