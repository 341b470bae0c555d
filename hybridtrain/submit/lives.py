"""The lives of a run on a cluster, and the verdict after each: done, once more, or failed. Decides; calls no scheduler.

    runs/<name>/submit/lives.json   a list, one entry per life of a job: chain, job, life, nodes, started, ended, step_before, step_after, outcome

A chain is what one `sbatch` began: its requeues, and the jobs that took its place without a bad node. The budget is the chain's.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from hybridtrain.checkpoint.manager import Manager
from hybridtrain.config.schema import CheckpointConfig
from hybridtrain.files import write_atomically

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
    """Step of the newest complete checkpoint, as this life found it."""
    ended: float = 0.0
    step_after: int = 0
    outcome: str = ""
    """finished, preempted, cancelled or failed; empty: it runs, or its node went away with it."""


def newest_step(run: Path) -> int:
    """Step of the newest complete checkpoint of a run; 0 without one."""
    return max(Manager(run / "checkpoints", settings=CheckpointConfig()).steps(), default=0)


def read(run: Path) -> list[Life]:
    file = run / "submit" / "lives.json"
    return [Life(**entry) for entry in json.loads(file.read_text())] if file.is_file() else []


def write(run: Path, lives: list[Life]) -> None:
    """Atomically: a requeue may end the writer."""
    file = run / "submit" / "lives.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps([asdict(life) for life in lives], indent=1) + "\n")


def begin(run: Path, *, chain: str, job: str, life: int, nodes: str) -> None:
    """Note that a life begins."""
    write(run, [*read(run), Life(chain, job, life, nodes, time.time(), newest_step(run))])


def end(run: Path, *, outcome: str) -> None:
    """Note how the newest life ended."""
    lives = read(run)
    lives[-1].ended, lives[-1].step_after, lives[-1].outcome = time.time(), newest_step(run), outcome
    write(run, lives)


def verdict(lives: list[Life], *, max_restarts: int) -> tuple[str, str]:
    """(DONE, REQUEUE or FAILED, why), after the newest of `lives` has ended."""
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
        return FAILED, f"no new checkpoint since the last life (step {last.step_after})"
    return REQUEUE, f"{last.outcome} at checkpoint {last.step_after}; restart {len(chain)}"


def _progress(life: Life) -> bool:
    return life.step_after > life.step_before
