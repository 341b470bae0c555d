"""A private Slurm cluster of two nodes, and the run that its jobs are compared with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import slurm as private
from tests.runs import arguments, finished, rows
from tests.submit.jobs import ROOT


@pytest.fixture(scope="package")
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


@pytest.fixture(scope="package")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    run = tmp_path_factory.mktemp("whole") / "run"
    finished(4, arguments(run, data, parallel="tp2_pp2"))
    return rows(run)
