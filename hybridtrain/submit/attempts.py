"""The attempts of a run on a cluster, and the decision after each: done, requeue or failed.

Does not call Slurm.

    runs/<name>/submit/lives.json   a list, one object per attempt: chain, job, life, nodes, started, ended,
                                    step_before, step_after, outcome ("life" is `Attempt.restart`)

A chain is one `sbatch` with all its requeues, and the jobs that replaced it to avoid a bad node.
cluster.max_restarts counts per chain.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hybridtrain.checkpoint.manager import Manager
from hybridtrain.config.schema import CheckpointConfig
from hybridtrain.errors import UserError, refusal
from hybridtrain.runtime.files import number, read_json, unwritable, write_json

_log = logging.getLogger("hybridtrain.submit")
_JOB = re.compile(r"\d+([_+]\d+)?")
_KEYS = {"restart": "life"}
"""Field of an attempt -> its key in lives.json, where they differ."""
DONE, REQUEUE, FAILED = "done", "requeue", "failed"


@dataclass
class Attempt:
    chain: str
    """Id of the first job of the chain."""
    job: str
    restart: int
    """How often Slurm had requeued this job."""
    nodes: str
    started: float
    """Unix time, as `ended`."""
    step_before: int
    """Step of the newest complete checkpoint when this attempt started."""
    ended: float = 0.0
    step_after: int = 0
    """Step of the newest complete checkpoint when this attempt ended."""
    outcome: str = ""
    """finished, preempted, cancelled or failed; empty: still running, or lost together with its node."""


def newest_step(run: Path) -> int:
    """Step of the newest complete checkpoint of a run; 0 without one."""
    return max(Manager(run / "checkpoints", settings=CheckpointConfig()).steps(), default=0)


def read(run: Path) -> list[Attempt]:
    """The attempts in lives.json, oldest first; empty if there is no file.

    Raises UserError if it cannot be read.
    """
    file = run / "submit" / "lives.json"
    if not file.exists():
        return []
    entries = read_json(file, field="run.dir")
    if not isinstance(entries, list):
        raise refusal(
            "run.dir",
            file,
            "it cannot be read: it holds no list",
            allowed="what a job of this run wrote",
            instead="restore the file, or remove it",
        )
    return [_parse(entry, file) for entry in entries]


def _parse(entry: Any, file: Path) -> Attempt:
    """One attempt.

    Keys that another version added are ignored, keys that it did not write have their default.
    """
    values = (
        {field.name: entry[key] for field in fields(Attempt) if (key := _key(field.name)) in entry}
        if isinstance(entry, Mapping)
        else {}
    )
    kinds = {
        "str": lambda value: isinstance(value, str),
        "int": lambda value: type(value) is int,
        "float": lambda value: number(value) is not None,
    }
    wrong = [
        _key(field.name)
        for field in fields(Attempt)
        if not (
            kinds[str(field.type)](values[field.name])
            if field.name in values
            else field.default is not MISSING
        )
    ]
    if wrong:
        problem = f"it cannot be read: {', '.join(wrong)} missing or of another type"
        raise refusal(
            "run.dir",
            file,
            problem,
            allowed="what a job of this run wrote",
            instead="restore the file, or remove it",
        )
    return Attempt(**values)


def _key(name: str) -> str:
    """The key in lives.json of a field of `Attempt`."""
    return _KEYS.get(name, name)


def read_or_reset(run: Path) -> list[Attempt]:
    """`read` for a job, which must go on: a file that cannot be read is renamed, with a warning, and
    the count starts anew.
    """
    try:
        return read(run)
    except UserError as error:
        file = run / "submit" / "lives.json"
        aside = file.with_name(f"lives.unreadable-{int(time.time())}.json")
        _log.warning(
            "%s; earlier starts are not counted, the file is kept as %s",
            str(error).splitlines()[0],
            aside.name,
        )
        try:
            file.rename(aside)
        except OSError as problem:
            _log.warning("%s cannot be set aside (%s)", file, problem.strerror or problem)
        return []


def job_id(run: Path) -> str:
    """The id of the newest job of a run; empty if it has none.

    Raises UserError if the file with it cannot be read or holds no job id.
    """
    file = run / "submit" / "job_id"
    try:
        text = file.read_bytes().decode("ascii").strip()
    except FileNotFoundError:
        attempts = read(run)
        return attempts[-1].job if attempts else ""
    except (OSError, UnicodeDecodeError) as error:
        raise refusal(
            "run.dir", file, f"it cannot be read: {error}", allowed="a job id", instead="remove the file"
        ) from error
    if not _JOB.fullmatch(text):
        raise refusal(
            "run.dir",
            file,
            "it holds no job id",
            allowed="a number as sbatch gives it",
            instead="remove the file",
        )
    return text


def write(run: Path, attempts: list[Attempt]) -> None:
    """Write lives.json, atomically because a requeue may kill this process.

    Raises UserError on a full disk.
    """
    file = run / "submit" / "lives.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            file, [{_key(name): value for name, value in asdict(attempt).items()} for attempt in attempts]
        )
    except OSError as error:
        raise unwritable("run.dir", file, error) from error


def begin(run: Path, *, chain: str, job: str, restart: int, nodes: str) -> None:
    """Record the start of an attempt."""
    write(run, [*read_or_reset(run), Attempt(chain, job, restart, nodes, time.time(), newest_step(run))])


def end(run: Path, *, job: str, restart: int, outcome: str) -> tuple[list[Attempt], bool]:
    """Record how this attempt ended; one whose start was not recorded is added.

    Returns all attempts, and whether they were saved (if not, a warning is logged).
    """
    attempts = read_or_reset(run)
    if not attempts or (attempts[-1].job, attempts[-1].restart) != (job, restart):
        chain = os.environ.get("HYBRIDTRAIN_CHAIN") or job
        attempts.append(
            Attempt(
                chain,
                job,
                restart,
                os.environ.get("SLURM_JOB_NODELIST", ""),
                started_at(run, job=job, restart=restart),
                0,
            )
        )
    attempts[-1].ended, attempts[-1].step_after, attempts[-1].outcome = time.time(), newest_step(run), outcome
    try:
        write(run, attempts)
    except UserError as error:
        _log.warning("%s", str(error).splitlines()[0])
        return attempts, False
    return attempts, True


def started_at(run: Path, *, job: str, restart: int) -> float:
    """Start of an attempt, Unix time: as recorded, else the time of its log folder, else 0."""
    starts = [
        attempt.started for attempt in read_or_reset(run) if (attempt.job, attempt.restart) == (job, restart)
    ]
    if starts:
        return starts[-1]
    logs = run / "logs" / f"job-{job}" / f"life-{restart}"
    return min((path.stat().st_mtime for path in (logs, *logs.glob("*")) if path.exists()), default=0.0)


def decide(attempts: list[Attempt], *, max_restarts: int) -> tuple[str, str]:
    """What to do now that the newest of `attempts` has ended: (DONE, REQUEUE or FAILED, the reason)."""
    last = attempts[-1]
    chain = [attempt for attempt in attempts if attempt.chain == last.chain]
    if last.outcome == "finished":
        return DONE, "the run reached its end"
    if last.outcome == "cancelled":
        return FAILED, "the job was cancelled; the same command goes on"
    failures = sum(attempt.outcome == "failed" for attempt in chain)
    if last.outcome == "failed" and failures > max_restarts:
        return FAILED, f"{failures} failures, and cluster.max_restarts={max_restarts}"
    if len(chain) > 1 and not _progress(last) and not (last.outcome == "preempted" and _progress(chain[-2])):
        return FAILED, f"no new checkpoint in the last attempt (step {last.step_after})"
    return REQUEUE, f"{last.outcome} at checkpoint {last.step_after}; restart {len(chain)}"


def _progress(attempt: Attempt) -> bool:
    """Whether an attempt saved a new checkpoint."""
    return attempt.step_after > attempt.step_before
