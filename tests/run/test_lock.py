"""The lock of a run directory, between real processes: with flock and without, dead processes, other
hosts, requeued jobs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybridtrain.errors import UserError
from hybridtrain.run import holder, lock

EVERY = 0.25
HOLD = """
import os, sys, time
from pathlib import Path
from hybridtrain.run import holder, lock
from hybridtrain.errors import UserError
folder, flock, machine = Path(sys.argv[1]), sys.argv[2] == "True", sys.argv[3]
every, start = float(sys.argv[4]), float(sys.argv[5])
lock.FLOCK, holder.BEAT_S = flock, every
if machine:
    holder._machine = lambda: machine
time.sleep(max(0.0, start - time.time()))
try:
    mine = lock.acquire(folder, takeover=False)
except UserError as error:
    print("refused", str(error).splitlines()[0], flush=True)
else:
    print("have", flush=True)
    sys.stdin.read()
    mine.release()
"""


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holder, "BEAT_S", EVERY)
    for name in [name for name in os.environ if name.startswith(("SLURM", "HYBRIDTRAIN"))]:
        monkeypatch.delenv(name)


def start(
    folder: Path, *, flock: bool, machine: str = "", at: float = 0.0, **environment: str
) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", HOLD, str(folder), str(flock), machine, str(EVERY), str(at)]
    return subprocess.Popen(
        argv, env={**os.environ, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@contextlib.contextmanager
def holding(
    folder: Path, *, flock: bool, machine: str = "", **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the lock; it is dead afterwards."""
    process = start(folder, flock=flock, machine=machine, **environment)
    try:
        assert answer(process) == "have"
        yield process
    finally:
        process.kill()
        process.communicate()


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        lock.acquire(folder, takeover=False)
    return str(error.value)


BOTH = pytest.mark.parametrize("flock", [True, False])


@BOTH
def test_a_second_process_is_refused_by_name_and_a_dead_one_is_followed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flock: bool
) -> None:
    monkeypatch.setattr(lock, "FLOCK", flock)
    with holding(tmp_path, flock=flock) as process:
        words = refused(tmp_path)
        assert f"run.dir={tmp_path}: process {process.pid} on " in words
        assert f" trains here since {time.strftime('%Y-%m-%d')}" in words
        assert f"kill {process.pid}" in words
        assert lock.alive(tmp_path) is True
    assert lock.alive(tmp_path) is False
    begun = time.monotonic()
    mine = lock.acquire(tmp_path, takeover=False)
    assert time.monotonic() - begun < (0.5 if flock else 2.0)
    assert lock.read(tmp_path).pid == os.getpid()
    mine.release()
    mine.release()
    assert list(tmp_path.iterdir()) == []
    assert lock.alive(tmp_path) is None


@BOTH
def test_one_of_many_that_start_at_the_same_moment_has_it(tmp_path: Path, flock: bool) -> None:
    """Also when all find the lock of a dead process there."""
    with holding(tmp_path, flock=flock):
        pass
    for _ in range(2):
        at = time.time() + 1.0
        several = [start(tmp_path, flock=flock, at=at) for _ in range(6)]
        said = [answer(process) for process in several]
        assert sorted(word.partition(" ")[0] for word in said) == ["have", *["refused"] * 5], said
        winner = several[said.index("have")]
        assert all(f"process {winner.pid} on " in word for word in said if word != "have"), said
        for process in several:
            process.kill()
            process.communicate()


@BOTH
def test_another_host_is_refused_while_its_beat_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flock: bool
) -> None:
    # as where flock does not reach the other host, though both have it
    monkeypatch.setattr(lock, "FLOCK", False)
    with holding(
        tmp_path, flock=flock, machine="elsewhere", SLURM_JOB_ID="7", SLURMD_NODENAME="n2"
    ) as process:
        words = refused(tmp_path)
        assert f"process {process.pid} on n2 (job 7) trains here since" in words
        assert "scancel 7" in words
        assert process.poll() is None


def test_another_host_that_is_silent_is_followed_after_three_beats_with_a_countdown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with holding(tmp_path, flock=True, machine="elsewhere"):
        pass
    begun = time.monotonic()
    with caplog.at_level("WARNING", logger="hybridtrain"):
        mine = lock.acquire(tmp_path, takeover=False)
    assert 3 * EVERY <= time.monotonic() - begun < 3 * EVERY + 1.5
    lines = [
        record.getMessage()
        for record in caplog.records
        if "without a sign of life it is taken over in" in record.getMessage()
    ]
    assert len(lines) == 3, lines
    mine.release()


def test_with_takeover_it_is_had_at_once_and_the_one_before_learns_it(tmp_path: Path) -> None:
    before = lock.acquire(tmp_path, takeover=False)
    mine = lock.acquire(tmp_path, takeover=True)
    time.sleep(3 * EVERY)
    with pytest.raises(UserError, match=r"has taken it over from this one"):
        before.check()
    mine.check()
    before.release()
    assert lock.read(tmp_path) == mine.holder, "who lost the lock does not remove it"
    mine.release()


def test_the_same_job_requeued_has_it_at_once_and_another_job_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the job script finds it: Slurm has ended the attempt before, whatever the network
    file system believes."""
    with holding(tmp_path, flock=True, machine="elsewhere", SLURM_JOB_ID="7", SLURM_RESTART_COUNT="0"):
        monkeypatch.setenv("SLURM_JOB_ID", "8")
        assert "scancel 7" in refused(tmp_path)
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        assert "trains here" in refused(tmp_path), "the same attempt: a second step of one job"
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        assert lock.holder_elsewhere(tmp_path) is None
        begun = time.monotonic()
        mine = lock.acquire(tmp_path, takeover=False)
        assert time.monotonic() - begun < 0.5
        assert lock.read(tmp_path).attempt == 1
        mine.release()


def test_the_job_that_takes_the_place_of_one_without_its_bad_node_has_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with holding(tmp_path, flock=True, machine="elsewhere", SLURM_JOB_ID="7"):
        for name, value in {"SLURM_JOB_ID": "9", "HYBRIDTRAIN_CHAIN": "7"}.items():
            monkeypatch.setenv(name, value)
        lock.acquire(tmp_path, takeover=False).release()


def test_a_child_that_outlives_a_dead_process_does_not_keep_its_lock(tmp_path: Path) -> None:
    """A forked child shares the flock of its parent."""
    fork = HOLD.replace(
        'print("have", flush=True)',
        'child = os.fork()\n    child or time.sleep(60)\n    print("have", child, flush=True)',
    )
    argv = [sys.executable, "-c", fork, str(tmp_path), "True", "", str(EVERY), "0"]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child = int(answer(process).split()[1])
    process.kill()
    process.wait()
    try:
        lock.acquire(tmp_path, takeover=False).release()
    finally:
        os.kill(child, 9)
    process.communicate()


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"host": 3}', "\0\0"])
def test_a_lock_that_cannot_be_read_and_that_nobody_holds_is_no_lock(tmp_path: Path, text: str) -> None:
    (tmp_path / lock.NAME).write_text(text)
    assert lock.read(tmp_path) is None
    lock.acquire(tmp_path, takeover=False).release()


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_what_is_no_file_is_refused_and_stays(tmp_path: Path, kind: str) -> None:
    (tmp_path / "thesis").write_text("mine")
    file = tmp_path / lock.NAME
    {"folder": file.mkdir, "link": lambda: file.symlink_to("thesis"), "pipe": lambda: os.mkfifo(file)}[kind]()
    assert lock.read(tmp_path) is None
    assert lock.alive(tmp_path) is None
    words = {
        "folder": "a folder has this name",
        "link": "a link has this name",
        "pipe": "something else has this name",
    }
    assert words[kind] in refused(tmp_path)
    assert (tmp_path / "thesis").read_text() == "mine"
    assert os.path.lexists(file)


@pytest.mark.parametrize(
    "fields",
    [
        {"every": 1e9},
        {"every": -1.0},
        {"every": float("nan")},
        {"since": float("inf")},
        {"since": -1.0},
        {"pid": float("inf")},
    ],
)
def test_a_lock_with_numbers_that_no_process_wrote_is_no_lock(
    tmp_path: Path, fields: dict[str, float]
) -> None:
    other = {**dataclasses.asdict(holder.this_process()), "machine": "elsewhere", **fields}
    (tmp_path / lock.NAME).write_text(json.dumps(other, indent=1))
    lock.acquire(tmp_path, takeover=False).release()
