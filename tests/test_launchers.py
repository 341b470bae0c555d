"""The trainer reads the standard rank variables: whatever sets them can start it. (srun: test_slurm.py)"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import arguments, finished, rows

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def expected(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    run = tmp_path_factory.mktemp("expected") / "run"
    finished(2, arguments(run, data, train__steps=3))
    return rows(run)


def launched(command: list[str], run: Path, data: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}", **environment}
    return subprocess.run([*command, *arguments(run, data, train__steps=3)], env=settings, capture_output=True, text=True, timeout=180, check=False)


def test_our_own_script(data, expected, tmp_path):
    done = launched(["bash", str(ROOT / "launch/torchrun.sh")], tmp_path / "run", data, NPROC="2")
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "run") == expected


def test_our_own_script_on_two_machines(data, expected, tmp_path):
    """Both of them are this one."""
    script = ["bash", str(ROOT / "launch/torchrun.sh"), *arguments(tmp_path / "run", data, train__steps=3)]
    base = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT), "PATH": f"{BIN}:{os.environ['PATH']}"}
    both = [subprocess.Popen(script, env={**base, "NNODES": "2", "NODE_RANK": node, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611"}) for node in "01"]
    assert [process.wait(180) for process in both] == [0, 0]
    assert rows(tmp_path / "run") == expected


def test_accelerate_launch(data, expected, tmp_path):
    flags = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = launched([str(BIN / "accelerate"), "launch", *flags, "-m", "hybridtrain.train"], tmp_path / "run", data)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "run") == expected


def test_the_deepspeed_launcher(data, expected, tmp_path):
    done = launched([str(BIN / "deepspeed"), "--num_gpus", "2", "--module", "hybridtrain.train"], tmp_path / "run", data, DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "run") == expected
