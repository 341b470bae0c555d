"""`hybridtrain runs` and `hybridtrain logs`: what runs there are, how they stand, and what one says."""

from __future__ import annotations

import time
from pathlib import Path

from hybridtrain.config.schema import LogsRoot, RunsRoot
from hybridtrain.rundir import read_summary
from hybridtrain.submit import lives, slurm
from hybridtrain.types import refusal

_COLUMNS = ("run", "status", "step", "loss", "tokens/s", "checkpoint", "job", "state", "reason")
_ENDED = ("finished", "failed", "preempted")


def runs(config: RunsRoot) -> int:
    """Print one line for each run directory, the newest last."""
    folder = Path(config.runs.folder)
    found = sorted(folder.glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise refusal("runs.folder", folder, "there is no run in it", allowed="a folder of run directories", instead="runs.folder=FOLDER")
    jobs = {path.parent: _job(path.parent) for path in found}
    states = slurm.states([job for job in jobs.values() if job])
    table = [_COLUMNS, *(_row(path.parent, job=jobs[path.parent], state=states.get(jobs[path.parent], "")) for path in found)]
    widths = [max(len(row[column]) for row in table) for column in range(len(_COLUMNS))]
    for row in table:
        print("  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _job(run: Path) -> str:
    file = run / "submit" / "job_id"
    if file.is_file():
        return file.read_text().strip()
    known = lives.read(run)
    return known[-1].job if known else ""


def _row(run: Path, *, job: str, state: str) -> tuple[str, ...]:
    summary = read_summary(run)
    loss, speed, reason = summary.get("final_loss"), summary.get("tokens_per_s"), str(summary.get("exit_reason") or "")
    return (
        run.name,
        str(summary.get("status")),
        f"{summary.get('steps') or 0}/{summary.get('total_steps') or '?'}",
        f"{loss:.4f}" if loss is not None else "-",
        f"{speed:.0f}" if speed is not None else "-",
        str(lives.newest_step(run) or "-"),
        job or "-",
        state or "-",
        reason if len(reason) <= 60 else reason[:57] + "...",
    )


def logs(config: LogsRoot) -> int:
    """Print the end of what rank 0 says, and what it says from now on until the run has ended."""
    run = Path(config.run.dir)
    if not run.is_dir():
        raise refusal("run.dir", run, "there is no such folder", allowed="the folder of a run", instead="hybridtrain runs")
    file = _newest_log(run)
    if file is None:
        raise refusal("run.dir", run, "nothing has been logged there", allowed="the folder of a run that has begun", instead="hybridtrain runs")
    text = file.read_text(errors="replace")
    print("\n".join(text.splitlines()[-config.logs.lines :]), flush=True)
    seen = len(text.encode())
    while config.logs.follow:
        ended = _has_ended(run)
        seen = _more(file, seen)
        newer = _newest_log(run)
        if newer not in (None, file):
            file, seen = newer, _more(newer, 0)  # type: ignore[assignment, arg-type]
        elif ended:
            break
        time.sleep(0.5)
    return 0


def _newest_log(run: Path) -> Path | None:
    """Of a job: the first node's, which has what goes wrong in launching too; else rank 0's own."""
    nodes = sorted(run.glob("logs/job-*/life-*/node-0.log"), key=lambda path: path.stat().st_mtime)
    own = run / "logs" / "rank-0.log"
    return nodes[-1] if nodes else own if own.is_file() else None


def _more(file: Path, seen: int) -> int:
    """Print what stands after byte `seen`; the file's new size."""
    with file.open("rb") as stream:
        stream.seek(seen)
        new = stream.read()
    print(new.decode(errors="replace"), end="", flush=True)
    return seen + len(new)


def _has_ended(run: Path) -> bool:
    """Whether nothing more will be said; a run that is requeued goes on."""
    status = read_summary(run).get("status")
    return status in _ENDED and not (status == "preempted" and lives.read(run))
