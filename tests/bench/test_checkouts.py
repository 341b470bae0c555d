"""launch/bench_peers.py with two checkouts of ours as contestants, here this one beside itself;
launch/bench_cases.py on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_two_checkouts_take_turns_on_the_same_work(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "launch" / "bench_peers.py"),
        "--checkouts",
        f"new={ROOT}",
        f"old={ROOT}",
    ]
    command += [
        "--mode",
        "dp2",
        "--prec",
        "fp32",
        "--model",
        "micro",
        "--seq",
        "32",
        "--rounds",
        "3",
        "--steps",
        "2",
        "--out",
        "t",
    ]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 0, ended.stderr
    new, old = json.loads((tmp_path / "t.json").read_text())
    assert (new["peer"], old["peer"], new["error"], old["error"]) == ("new", "old", "", "")
    assert len(new["rounds_s"]) == len(old["rounds_s"]) == 3
    assert new["loss"] == old["loss"] > 0  # the same work, to the last bit
    assert "new is faster by" in ended.stdout


def test_neither_or_both_kinds_of_contestants_are_refused() -> None:
    ended = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "bench_peers.py")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    assert "--checkouts" in ended.stderr


@pytest.mark.slow
def test_the_cases_of_one_gpu_run_on_a_tiny_model(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "launch" / "bench_cases.py"),
        "--tiny",
        "compiled",
        "plain",
        "packed",
        "selective",
    ]
    ended = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    rows = {
        row["case"]: row for row in map(json.loads, (tmp_path / "runs/cases.jsonl").read_text().splitlines())
    }
    assert [row.get("error") for row in rows.values()] == [None] * 4
    # the same weights and rows
    assert rows["compiled"]["loss"] == pytest.approx(rows["plain"]["loss"], rel=1e-3)
    assert rows["compiled"]["kernels"]
