"""The trainer reads the standard rank variables: whatever sets them can start it.

(srun: tests/submit/test_slurm.py)
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hybridtrain.runtime.launch import adopt_srun
from tests.runs import arguments, finished, rows

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def expected(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    run = tmp_path_factory.mktemp("expected") / "run"
    finished(2, arguments(run, data, train__steps=3))
    return rows(run)


def launched(
    command: list[str], run: Path, data: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    settings = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}:{os.environ['PATH']}",
        **environment,
    }
    return subprocess.run(
        [*command, *arguments(run, data, train__steps=3)],
        env=settings,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def adopted(monkeypatch: pytest.MonkeyPatch, **given: str) -> dict[str, str]:
    """The rank variables after a start in an environment with `given` alone."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    monkeypatch.setattr(os, "environ", dict(given))
    adopt_srun()
    return {name: os.environ[name] for name in names if name in os.environ}


TASK = {
    "SLURM_JOB_ID": "10007",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "MASTER_ADDR": "10.0.0.1",
}


def test_ranks_of_a_plain_srun(monkeypatch):
    """The local rank chooses the GPU."""
    rank = {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "20007",
    }
    assert adopted(monkeypatch, **TASK) == rank
    assert adopted(monkeypatch, **TASK, MASTER_PORT="1234") == {**rank, "MASTER_PORT": "1234"}
    torchruns = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "other",
        "MASTER_PORT": "1",
    }
    assert adopted(monkeypatch, **{**TASK, **torchruns}) == torchruns
    alone = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}  # a shell in a job, or one task
    assert adopted(monkeypatch, **alone) == adopted(monkeypatch, **alone, SLURM_STEP_NUM_TASKS="1") == {}


def test_our_own_script(data, expected, tmp_path):
    done = launched(["bash", str(ROOT / "launch/torchrun.sh")], tmp_path / "run", data, NPROC="2")
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "run") == expected


@pytest.mark.slow
def test_our_own_script_on_two_machines(data, expected, tmp_path):
    """Both of them are this one."""
    script = ["bash", str(ROOT / "launch/torchrun.sh"), *arguments(tmp_path / "run", data, train__steps=3)]
    base = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    both = [
        subprocess.Popen(
            script,
            env={
                **base,
                "NNODES": "2",
                "NODE_RANK": node,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "29611",
            },
        )
        for node in "01"
    ]
    assert [process.wait(180) for process in both] == [0, 0]
    assert rows(tmp_path / "run") == expected


def test_accelerate_launch(data, expected, tmp_path):
    flags = [
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    done = launched(
        [str(BIN / "accelerate"), "launch", *flags, "-m", "hybridtrain.train"], tmp_path / "run", data
    )
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "run") == expected


@pytest.mark.slow
def test_the_deepspeed_launcher(data, expected, tmp_path):
    done = launched(
        [str(BIN / "deepspeed"), "--num_gpus", "2", "--module", "hybridtrain.train"],
        tmp_path / "run",
        data,
        DS_ACCELERATOR="cpu",
    )
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "run") == expected
