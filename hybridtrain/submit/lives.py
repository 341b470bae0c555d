"""The attempts of a run on a cluster ("lives" in names), and the decision after each: done, requeue or failed. Does not call the scheduler.

    runs/<name>/submit/lives.json   a list, one entry per attempt of a job: chain, job, life, nodes, started, ended, step_before, step_after, outcome

A chain is one `sbatch` with all its requeues, and the jobs that replaced it to avoid a bad node. cluster.max_restarts counts per chain.
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
DONE, REQUEUE, FAILED = "done", "requeue", "failed"


@dataclass
class Life:
    chain: str
    """Job id that the chain began with."""
    job: str
    life: int
    nodes: str
    started: float
    step_before: int
    """Step of the newest complete checkpoint when this attempt began."""
    ended: float = 0.0
    step_after: int = 0
    outcome: str = ""
    """finished, preempted, cancelled or failed; empty: it runs, or its node went away with it."""


def newest_step(run: Path) -> int:
    """Step of the newest complete checkpoint of a run; 0 without one."""
    return max(Manager(run / "checkpoints", settings=CheckpointConfig()).steps(), default=0)


def read(run: Path) -> list[Life]:
    """What lives.json says; empty where there is none. Raises UserError that names the file if it cannot be read."""
    file = run / "submit" / "lives.json"
    if not file.exists():
        return []
    entries = read_json(file, field="run.dir")
    if not isinstance(entries, list):
        raise refusal("run.dir", file, "it cannot be read: it holds no list", allowed="what a job of this run wrote", instead="restore the file, or remove it")
    return [_life(entry, file) for entry in entries]


def _life(entry: Any, file: Path) -> Life:
    """One entry; what another version added is left out, what it did not write stands at its default."""
    values = entry if isinstance(entry, Mapping) else {}
    kinds = {"str": lambda value: isinstance(value, str), "int": lambda value: type(value) is int, "float": lambda value: number(value) is not None}
    wrong = [field.name for field in fields(Life) if not (kinds[str(field.type)](values[field.name]) if field.name in values else field.default is not MISSING)]
    if wrong:
        problem = f"it cannot be read: {', '.join(wrong)} missing or of another type"
        raise refusal("run.dir", file, problem, allowed="what a job of this run wrote", instead="restore the file, or remove it")
    return Life(**{field.name: values[field.name] for field in fields(Life) if field.name in values})


def known(run: Path) -> list[Life]:
    """`read` for a job, which goes on where the file cannot be read: it is warned of and set aside, and the count begins again."""
    try:
        return read(run)
    except UserError as error:
        file = run / "submit" / "lives.json"
        aside = file.with_name(f"lives.unreadable-{int(time.time())}.json")
        _log.warning("%s; earlier starts are not counted, the file is kept as %s", str(error).splitlines()[0], aside.name)
        try:
            file.rename(aside)
        except OSError as problem:
            _log.warning("%s cannot be set aside (%s)", file, problem.strerror or problem)
        return []


def job_id(run: Path) -> str:
    """The id of the newest job of a run; empty if it has none. Raises UserError if the file with it cannot be read or holds no job id."""
    file = run / "submit" / "job_id"
    try:
        text = file.read_bytes().decode("ascii").strip()
    except FileNotFoundError:
        lives = read(run)
        return lives[-1].job if lives else ""
    except (OSError, UnicodeDecodeError) as error:
        raise refusal("run.dir", file, f"it cannot be read: {error}", allowed="a job id", instead="remove the file") from error
    if not _JOB.fullmatch(text):
        raise refusal("run.dir", file, "it holds no job id", allowed="a number as sbatch gives it", instead="remove the file")
    return text


def write(run: Path, lives: list[Life]) -> None:
    """Atomically: a requeue may end the writer. Raises UserError on a full disk."""
    file = run / "submit" / "lives.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, [asdict(life) for life in lives])
    except OSError as error:
        raise unwritable("run.dir", file, error) from error


def begin(run: Path, *, chain: str, job: str, life: int, nodes: str) -> None:
    """Record the start of an attempt."""
    write(run, [*known(run), Life(chain, job, life, nodes, time.time(), newest_step(run))])


def end(run: Path, *, job: str, life: int, outcome: str) -> tuple[list[Life], bool]:
    """Record how this attempt of `job` ended, adding it if its start was not recorded. Returns all attempts, and whether they were saved (if not: a warning)."""
    lives = known(run)
    if not lives or (lives[-1].job, lives[-1].life) != (job, life):
        chain = os.environ.get("HYBRIDTRAIN_CHAIN") or job
        lives.append(Life(chain, job, life, os.environ.get("SLURM_JOB_NODELIST", ""), began(run, job=job, life=life), 0))
    lives[-1].ended, lives[-1].step_after, lives[-1].outcome = time.time(), newest_step(run), outcome
    try:
        write(run, lives)
    except UserError as error:
        _log.warning("%s", str(error).splitlines()[0])
        return lives, False
    return lives, True


def began(run: Path, *, job: str, life: int) -> float:
    """Start of an attempt in seconds since 1970: as recorded, else from its log folder, else 0."""
    noted = [one.started for one in known(run) if (one.job, one.life) == (job, life)]
    if noted:
        return noted[-1]
    logs = run / "logs" / f"job-{job}" / f"life-{life}"
    return min((path.stat().st_mtime for path in (logs, *logs.glob("*")) if path.exists()), default=0.0)


def verdict(lives: list[Life], *, max_restarts: int) -> tuple[str, str]:
    """(DONE, REQUEUE or FAILED, reason) after the newest attempt in `lives` has ended."""
    last = lives[-1]
    chain = [life for life in lives if life.chain == last.chain]
    if last.outcome == "finished":
        return DONE, "the run reached its end"
    if last.outcome == "cancelled":
        return FAILED, "the job was cancelled; the same command goes on"
    failures = sum(life.outcome == "failed" for life in chain)
    if last.outcome == "failed" and failures > max_restarts:
        return FAILED, f"{failures} failures, and cluster.max_restarts={max_restarts}"
    if len(chain) > 1 and not _progress(last) and not (last.outcome == "preempted" and _progress(chain[-2])):
        return FAILED, f"no new checkpoint in the last attempt (step {last.step_after})"
    return REQUEUE, f"{last.outcome} at checkpoint {last.step_after}; restart {len(chain)}"


def _progress(life: Life) -> bool:
    return life.step_after > life.step_before
