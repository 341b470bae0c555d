"""Who failed first: a rank that is frozen or cut off is named, hostile reports are no reports, and whoever survives writes it down."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from hybridtrain import failure
from tests.runs import arguments, summary, torchrun

WAITING = """Thread 0x00007f0001 (most recent call first):
  File "torch/distributed/distributed_c10d.py", line 3 in all_reduce
  File "hybridtrain/stop.py", line 68 in agreed
  File "hybridtrain/loop.py", line 38 in train
"""
COMPUTING = WAITING.replace("torch/distributed/distributed_c10d.py", "my/model.py").replace("hybridtrain/stop.py", "my/model.py")


def stacks(folder: Path, *texts: str) -> None:
    for rank, text in enumerate(texts):
        (folder / f"rank-{rank}.stacks").write_text(text)


def report(folder: Path, rank: int, error: str) -> None:
    told = {"time": 1.0 + rank, "rank": rank, "node": "n", "step": 3, "error": error, "traceback": "Traceback ..."}
    (folder / f"rank-{rank}.json").write_text(json.dumps(told))


def test_a_rank_without_a_sign_of_life_is_named_rather_than_those_that_wait_for_it(tmp_path):
    stacks(tmp_path, WAITING, "", WAITING)
    found = failure.first(tmp_path, world_size=3)
    assert found is not None
    assert found.rank == 1
    assert "gave no sign of life" in found.what
    assert "all_reduce" in found.detail
    assert failure.earlier(tmp_path) == found, "the next start knows the ranks by their files"
    assert (tmp_path / "first.txt").read_text().startswith("rank 1")
    assert failure.earlier(tmp_path) is None, "concluded once"


def test_a_rank_that_computes_is_named_before_one_that_is_silent_and_one_that_waits(tmp_path):
    stacks(tmp_path, WAITING, "", COMPUTING)
    assert failure.first(tmp_path, world_size=3).rank == 2
    stacks(tmp_path, WAITING, WAITING, WAITING)
    assert failure.first(tmp_path, world_size=3).rank == 0


HOSTILE = ["[1]", "{}", "null", "3", '"x"', '{"time": NaN}', '{"time": "x", "rank": 1}', '{"rank": [1], "time": 0, "error": "", "node": "", "traceback": ""}']


@pytest.mark.parametrize("text", [*HOSTILE, "[" * 200_000, "\0", '{"time": 1, "rank": true, "error": "x", "node": "n", "traceback": ""}'])
def test_a_file_that_is_no_report_is_passed_over(tmp_path, text):
    (tmp_path / "rank-1.json").write_text(text)
    (tmp_path / "rank-1.stacks").write_bytes(b"")
    (tmp_path / "rank-2.json").write_bytes(b"\xff\xfe")
    assert failure.first(tmp_path, world_size=3) is None
    report(tmp_path, 0, "ValueError: planted")
    found = failure.first(tmp_path, world_size=3)
    assert (found.rank, found.what) == (0, "ValueError: planted")


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_rank_is_named_under_plain_torchrun(data, tmp_path, frozen):
    """By the ranks that are left, within a minute after the limit; nobody else looks after such a run."""
    run = tmp_path / "run"
    argv = arguments(run, data, train__steps=5000, train__max_step_s=10)
    process = torchrun(2, argv)
    until = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)
    ranks = {rank.environ().get("RANK"): rank for rank in psutil.Process(process.pid).children()}
    os.kill(ranks[str(frozen)].pid, signal.SIGSTOP)
    began = time.monotonic()
    while not (run / "failures" / "life-0" / "first.txt").exists():
        assert time.monotonic() - began < 70
        time.sleep(0.1)
    time.sleep(2)
    assert (run / "failures" / "life-0" / "first.txt").read_text().startswith(f"rank {frozen}: it gave no sign of life")
    stood = summary(run)
    assert (stood["status"], str(stood["exit_reason"]).startswith(f"rank {frozen}: it gave no sign")) == ("failed", True)
    kinds = [json.loads(line)["kind"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert kinds[-1] == "failed"
    process.communicate(timeout=90)
