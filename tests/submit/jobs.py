"""Jobs on the private Slurm cluster: submitted, waited for, and what they have said."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from hybridtrain.cli import commands
from hybridtrain.submit import attempts
from tests.runs import arguments

ROOT = Path(__file__).resolve().parents[2]
TWO_BY_TWO = ["cluster.nodes=2", "cluster.ranks_per_node=2", "cluster.health_timeout_s=60"]


def submit(run: Path, data: Path, *more: str, **options: object) -> str:
    """The job's id."""
    argv = [*arguments(run, data, **{"parallel": "tp2_pp2", **options}), *TWO_BY_TWO, *more]
    assert commands.run_command("submit", argv) == 0
    return (run / "submit" / "job_id").read_text().strip()


def sabotage(monkeypatch: pytest.MonkeyPatch, **plan: object) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests/sabotage"), str(ROOT)]))
    monkeypatch.setenv("SABOTAGE", json.dumps(plan))


def wait_for_lines(run: Path, number: int) -> None:
    end = time.monotonic() + 120
    while (
        not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < number
    ):
        assert time.monotonic() < end, output(run)
        time.sleep(0.05)


def output(run: Path) -> str:
    """Everything a job of this run has said."""
    files = [*run.glob("submit/slurm-*.out"), *sorted(run.glob("logs/job-*/**/*.log"))]
    return "\n".join(f"--- {file}\n{file.read_text(errors='replace')[-6000:]}" for file in files)


def outcomes(run: Path) -> list[str]:
    return [attempt.outcome for attempt in attempts.read(run)]
