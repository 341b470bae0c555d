"""Runs as real Slurm jobs on a private cluster of two nodes: they train, stop, requeue, fail and go on as they would on a large one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from hybridtrain import command
from hybridtrain.submit import lives
from tests import slurm as private
from tests.runs import arguments, corpus, finished, rows, summary

ROOT = Path(__file__).resolve().parent.parent
TWO_BY_TWO = ["cluster.nodes=2", "cluster.ranks_per_node=2", "cluster.health_timeout_s=60"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[private.Slurm]:
    if absent := private.missing():
        words = f"Slurm is not installed (no {', '.join(absent)}): {private.INSTALL}"
        (pytest.fail if os.environ.get("HYBRIDTRAIN_NEEDS_SLURM") else pytest.skip)(words)
    started = private.Slurm(nodes=2, port=28000)
    yield started
    started.stop()


@pytest.fixture
def slurm(cluster: private.Slurm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[private.Slurm]:
    for key in [key for key in os.environ if key.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(key)
    for key in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(key, cluster.env[key])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    yield cluster
    cluster.clear()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    run = tmp_path_factory.mktemp("whole") / "run"
    finished(4, arguments(run, data, parallel="tp2_pp2"))
    return rows(run)


def submit(run: Path, data: Path, *more: str, **options: object) -> str:
    """The job's id."""
    argv = [*arguments(run, data, **{"parallel": "tp2_pp2", **options}), *TWO_BY_TWO, *more]
    assert command.run_command("submit", argv) == 0
    return (run / "submit" / "job_id").read_text().strip()


def sabotage(monkeypatch: pytest.MonkeyPatch, **plan: object) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests/sabotage"), str(ROOT)]))
    monkeypatch.setenv("SABOTAGE", json.dumps(plan))


def wait_for_lines(run: Path, number: int) -> None:
    end = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < number:
        assert time.monotonic() < end, output(run)
        time.sleep(0.05)


def output(run: Path) -> str:
    """Everything a job of this run has said."""
    files = [*run.glob("submit/slurm-*.out"), *sorted(run.glob("logs/job-*/**/*.log"))]
    return "\n".join(f"--- {file}\n{file.read_text(errors='replace')[-6000:]}" for file in files)


def outcomes(run: Path) -> list[str]:
    return [life.outcome for life in lives.read(run)]


def test_submit_trains_on_two_nodes(slurm, data, uninterrupted, tmp_path):
    run = tmp_path / "run"
    job = submit(run, data)
    ended = slurm.wait(job, timeout_s=180)
    assert ended["JobState"] == "COMPLETED", output(run)
    assert rows(run) == uninterrupted
    assert summary(run)["status"] == "finished"
    assert outcomes(run) == ["finished"]
    nodes = {path.parent.name: path for path in run.glob("logs/job-*/life-0/node-*.log")}
    assert nodes


def test_plain_sbatch_trains_too(slurm, data, uninterrupted, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setenv("HYBRIDTRAIN_PYTHON", sys.executable)
    monkeypatch.setenv("HYBRIDTRAIN_RANKS", "2")
    argv = arguments(run, data, parallel="tp2_pp2")
    job = (
        slurm.run("sbatch", "--parsable", "--nodes=2", f"--chdir={tmp_path}", "--export=ALL", str(ROOT / "slurm/train.sbatch"), *argv)
        if False
        else subprocess.run(
            ["sbatch", "--parsable", "--nodes=2", str(ROOT / "slurm/train.sbatch"), *argv], capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    ended = slurm.wait(job, timeout_s=180)
    assert ended["JobState"] == "COMPLETED", output(run) + (tmp_path / f"slurm-{job}.out").read_text()
    assert rows(run) == uninterrupted
