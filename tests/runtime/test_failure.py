"""Who failed first: a rank that is frozen or cut off is named, hostile reports are no reports, and whoever
survives writes it down."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from hybridtrain.runtime import failure
from tests.runs import arguments, summary, torchrun

WAITING = """Thread 0x00007f0001 (most recent call first):
  File "torch/distributed/distributed_c10d.py", line 3 in all_reduce
  File "hybridtrain/runtime/stop.py", line 68 in agreed
  File "hybridtrain/training/loop.py", line 38 in train
"""
COMPUTING = WAITING.replace("torch/distributed/distributed_c10d.py", "my/model.py").replace(
    "hybridtrain/runtime/stop.py", "my/model.py"
)


def stacks(folder: Path, *texts: str) -> None:
    folder.mkdir(exist_ok=True)
    for rank, text in enumerate(texts):
        (folder / f"rank-{rank}.stacks").write_text(text)


def report(folder: Path, rank: int, error: str) -> None:
    told = {
        "time": 1.0 + rank,
        "rank": rank,
        "node": "n",
        "step": 3,
        "error": error,
        "traceback": "Traceback ...",
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(told))


def test_a_rank_without_a_sign_of_life_is_named_rather_than_those_that_wait_for_it(tmp_path):
    stacks(tmp_path, WAITING, "", WAITING)
    found = failure.root_cause(tmp_path, world_size=3)
    assert found is not None
    assert found.rank == 1
    assert "gave no sign of life" in found.what
    assert "all_reduce" in found.detail
    assert failure.of_lost_attempt(tmp_path) == found, "the next start knows the ranks by their files"
    assert (tmp_path / "first.txt").read_text().startswith("rank 1")
    assert failure.of_lost_attempt(tmp_path) is None, "concluded once"


def test_a_rank_that_computes_is_named_before_one_that_is_silent_and_one_that_waits(tmp_path):
    stacks(tmp_path, WAITING, "", COMPUTING)
    assert failure.root_cause(tmp_path, world_size=3).rank == 2


def test_no_rank_is_blamed_where_all_wait_for_each_other(tmp_path):
    elsewhere = WAITING.replace("hybridtrain/runtime/stop.py", "hybridtrain/engine/torch_native.py")
    stacks(tmp_path, WAITING, elsewhere, WAITING)
    found = failure.record_root_cause(tmp_path, world_size=3)
    assert found.rank is None
    assert str(found).startswith(
        "all ranks: they waited for each other longer than train.max_step_s: the network between them is cut"
    )
    assert found.detail == f"rank 0, 2 waited here:\n{WAITING}\n\nrank 1 waited here:\n{elsewhere}"
    stacks(tmp_path / "alone", WAITING)
    assert failure.root_cause(tmp_path / "alone", world_size=1).rank == 0


HOSTILE = [
    "[1]",
    "{}",
    "null",
    "3",
    '"x"',
    '{"time": NaN}',
    '{"time": "x", "rank": 1}',
    '{"rank": [1], "time": 0, "error": "", "node": "", "traceback": ""}',
]


@pytest.mark.parametrize(
    "text",
    [*HOSTILE, "[" * 200_000, "\0", '{"time": 1, "rank": true, "error": "x", "node": "n", "traceback": ""}'],
)
def test_a_file_that_is_no_report_is_passed_over(tmp_path, text):
    (tmp_path / "rank-1.json").write_text(text)
    (tmp_path / "rank-1.stacks").write_bytes(b"")
    (tmp_path / "rank-2.json").write_bytes(b"\xff\xfe")
    assert failure.root_cause(tmp_path, world_size=3) is None
    report(tmp_path, 0, "ValueError: planted")
    found = failure.root_cause(tmp_path, world_size=3)
    assert (found.rank, found.what) == (0, "ValueError: planted")


def steps(run: Path, count: int, processes: list[subprocess.Popen[str]]) -> None:
    """Wait until the run has made that many."""
    until = time.monotonic() + 120
    while (
        not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < count
    ):
        if time.monotonic() > until or any(process.poll() is not None for process in processes):
            for process in processes:
                process.kill()
            raise AssertionError([process.communicate() for process in processes])
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_rank_is_named_under_plain_torchrun(data, tmp_path, frozen):
    """By the ranks that are left, within a minute after the limit; nobody else looks after such a run."""
    run = tmp_path / "run"
    argv = arguments(run, data, train__steps=5000, train__max_step_s=10)
    process = torchrun(2, argv)
    steps(run, 3, [process])
    ranks = {rank.environ().get("RANK"): rank for rank in psutil.Process(process.pid).children()}
    os.kill(ranks[str(frozen)].pid, signal.SIGSTOP)
    began = time.monotonic()
    while not (run / "failures" / "life-0" / "first.txt").exists():
        assert time.monotonic() - began < 70
        time.sleep(0.1)
    time.sleep(2)
    assert (
        (run / "failures" / "life-0" / "first.txt")
        .read_text()
        .startswith(f"rank {frozen}: it gave no sign of life")
    )
    stood = summary(run)
    assert (stood["status"], str(stood["exit_reason"]).startswith(f"rank {frozen}: it gave no sign")) == (
        "failed",
        True,
    )
    kinds = [json.loads(line)["kind"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert kinds[-1] == "failed"
    process.communicate(timeout=90)


def network(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them: 10.213.0.1 and 10.213.0.2 on `cable`."""
    names = [f"ht{os.getpid()}-{number}" for number in range(2)]
    if (
        shutil.which("ip") is None
        or subprocess.run(["ip", "netns", "add", names[0]], capture_output=True, check=False).returncode
    ):
        pytest.skip("network namespaces cannot be made here")
    try:
        network("netns", "add", names[1])
        network(
            "-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1]
        )
        for number, name in enumerate(names):
            network("-n", name, "addr", "add", f"10.213.0.{number + 1}/24", "dev", "cable")
            for device in ("lo", "cable"):
                network("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.slow
def test_a_cut_link_is_blamed_on_no_rank(data, tmp_path, hosts):
    run = tmp_path / "run"
    argv = [
        sys.executable,
        "-m",
        "hybridtrain.train",
        *arguments(run, data, train__steps=5000, train__max_step_s=10),
    ]
    world = {
        **os.environ,
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "10.213.0.1",
        "MASTER_PORT": "29431",
        "OMP_NUM_THREADS": "1",
    }
    world.pop("GLOO_SOCKET_IFNAME", None)  # the way to rank 0 tells it
    ranks = [
        subprocess.Popen(
            ["ip", "netns", "exec", host, *argv],
            env={**world, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, host in enumerate(hosts)
    ]
    steps(run, 3, ranks)
    network("-n", hosts[0], "link", "set", "cable", "down")
    began = time.monotonic()
    said = [rank.communicate(timeout=100)[0] for rank in ranks]
    assert time.monotonic() - began < 70, said
    assert [rank.returncode for rank in ranks] == [1, 1], said
    assert (
        (run / "failures" / "life-0" / "first.txt")
        .read_text()
        .startswith("all ranks: they waited for each other")
    ), said
    assert (summary(run)["status"], str(summary(run)["exit_reason"])[:10]) == ("failed", "all ranks:")
