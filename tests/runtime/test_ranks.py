"""The runner of ranks: results by rank, the first failure told, and no process left behind
however the caller goes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hybridtrain.runtime import ranks
from tests.ranks import RankFailed, run_ranks

CALLER = """
import signal, sys
# the signal is ignored, if whoever started the tests did it in the background
signal.signal(signal.SIGINT, signal.default_int_handler)
from hybridtrain.runtime.ranks import run_ranks
from tests.runtime import test_ranks
run_ranks(2, test_ranks.sleep, sys.argv[1], preload=("torch",), backend="gloo", timeout_s=100)
"""


def add(number: int) -> tuple[int, int]:
    total = torch.tensor(number + dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def fail(first: int) -> None:
    print(f"rank {dist.get_rank()} was here")
    if dist.get_rank() == first:
        raise ValueError("planted")
    dist.barrier()  # waits for a rank that is gone


def abort() -> None:
    if dist.get_rank() == 1:
        os.abort()
    dist.barrier()


def die_late() -> None:
    if dist.get_rank() == 0:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1")  # as gloo says it
    time.sleep(0.5)
    os.abort()


def sleep(folder: str) -> None:
    (Path(folder) / f"{os.getpid()} {os.getppid()}").touch()
    time.sleep(100)


def rank_0_is_there_a_second_later() -> bool:
    pids: list[int] = [0, 0]
    dist.all_gather_object(pids, os.getpid())
    if dist.get_rank() == 1:
        time.sleep(1)
    return alive(pids[0])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_results_come_by_rank():
    assert run_ranks(3, add, 10) == [(0, 33), (1, 33), (2, 33)]


def test_the_first_failing_ranks_traceback_and_output_are_told():
    with pytest.raises(
        RankFailed,
        match=(
            r"(?s)rank 1 failed first:\nTraceback.*ValueError: planted.*"
            r"last output of rank 1:\nrank 1 was here"
        ),
    ):
        run_ranks(2, fail, 1)
    assert run_ranks(2, add, 1) == [(0, 3), (1, 3)], "the next call is not affected"


def test_a_rank_that_dies_is_told():
    for how in (abort, die_late):
        with pytest.raises(RankFailed, match="rank 1 failed first:\ndied without a word"):
            run_ranks(2, how)


def test_time_out(tmp_path):
    with pytest.raises(RankFailed, match="did not finish within 1 s"):
        run_ranks(2, sleep, str(tmp_path), timeout_s=1.0)
    assert not any(alive(int(path.name.split()[0])) for path in tmp_path.iterdir())


def test_a_server_that_is_gone_is_replaced():
    run_ranks(1, add, 1)
    ranks._SERVERS["running"].process.kill()
    ranks._SERVERS["running"].process.wait()
    assert run_ranks(1, add, 1) == [(0, 1)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left_behind(tmp_path, how):
    root = Path(__file__).resolve().parents[2]
    with (tmp_path.parent / f"{tmp_path.name}.log").open("wb") as log:
        caller = subprocess.Popen(
            [sys.executable, "-c", CALLER, tmp_path],
            cwd=root,
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    started = {int(pid) for path in tmp_path.iterdir() for pid in path.name.split()}
    assert len(started) == 3, "two ranks and the server they forked from"
    caller.send_signal(how)
    assert caller.wait(timeout=60) != 0
    deadline = time.monotonic() + 30
    while any(map(alive, started)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in started if alive(pid)]


def test_a_rank_that_is_done_stays_until_the_others_are():
    """A rank that is still connecting would take its end for a crash ("Connection closed by peer")."""
    run_ranks(2, rank_0_is_there_a_second_later)  # the server that ranks are forked from starts
    began = time.monotonic()
    assert run_ranks(2, rank_0_is_there_a_second_later) == [True, True]
    assert time.monotonic() - began < ranks.GRACE_S  # and is ended at once when they are
