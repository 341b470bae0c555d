"""kill -9 of every rank at any moment, then the same command: the run ends with the losses of an
uninterrupted one, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.ranks import RankFailed, run_ranks
from tests.runs import Ended, arguments, checkpoints, finished, on_this_rank, rows, summary, torchrun

TP_PP = {"parallel__pp": 2, "parallel__tp": 2}


def unfinished_save(run: Path) -> bool:
    """Whether a save was cut short."""
    return any((run / "checkpoints").glob("*.partial"))


def saved(run: Path) -> bool:
    """Whether there is a complete checkpoint."""
    return any((run / "checkpoints").glob("step-*/complete.json"))


def dies(argv: list[str], run: Path, lines: int | None, seconds: float) -> Ended:
    """On each rank: the run, until metrics.jsonl has grown `lines` times (None: until a save is under way)
    and some more time; then kill -9."""
    started = {path.name for path in (run / "checkpoints").glob("*.partial")}

    def watch() -> None:
        if lines is None:
            while not any(path.name not in started for path in (run / "checkpoints").glob("*.partial")):
                time.sleep(0.0005)
        before, seen = size(run / "metrics.jsonl"), 0
        while seen < (lines or 0):
            time.sleep(0.001)
            now = size(run / "metrics.jsonl")
            seen, before = seen + (now > before), now
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    return on_this_rank(argv)


def size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def killed(world_size: int, argv: list[str], run: Path, *, lines: int | None, seconds: float) -> None:
    with pytest.raises(RankFailed, match="died without a word"):
        run_ranks(world_size, dies, argv, run, lines, seconds)


def test_two_kills_one_of_them_in_a_save(data: Path, tmp_path: Path) -> None:
    straight, run = tmp_path / "straight", tmp_path / "run"
    finished(2, arguments(straight, data, train__steps=24, checkpoint__every=4))
    argv = arguments(run, data, train__steps=24, checkpoint__every=4)
    killed(2, argv, run, lines=None, seconds=0.0)
    assert unfinished_save(run)
    assert summary(run)["status"] == "running", "nothing could be said about the end"
    killed(2, argv, run, lines=random.randint(5, 12), seconds=random.uniform(0.0, 0.05))
    finished(2, argv)
    assert rows(run) == rows(straight)
    assert checkpoints(run) == checkpoints(straight)
    assert summary(run)["status"] == "finished"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("world_size", "kills", "options"), [(2, 20, {}), (4, 6, TP_PP)])
def test_kills_at_random_moments(
    data: Path, tmp_path: Path, world_size: int, kills: int, options: dict[str, object]
) -> None:
    """While starting, computing, evaluating, logging, saving, pruning: wherever chance has it."""
    straight, run = tmp_path / "straight", tmp_path / "run"
    options = {"train__steps": 10 * kills, "train__eval_every": 25, "train__eval_rows": 8, **options}
    finished(world_size, arguments(straight, data, **options))
    argv, chance = arguments(run, data, checkpoint__every=2, **options), random.Random()
    in_save = 0
    for number in range(kills):
        lines = chance.randint(0, 9)
        killed(
            world_size,
            argv,
            run,
            lines=lines,
            seconds=chance.uniform(0.0, 0.2) if lines else chance.uniform(0.0, 2.0),
        )
        in_save += unfinished_save(run)
        kept = checkpoints(run) if (run / "checkpoints").is_dir() else []
        print(f"kill {number + 1}: {lines} lines later, {kept}")
    while in_save < 3:  # chance decides how many of those hit a save; these do for certain
        killed(world_size, argv, run, lines=None, seconds=chance.uniform(0.0, 0.01))
        in_save += unfinished_save(run)
    finished(world_size, argv)
    assert rows(run) == rows(straight)
    print(f"{kills} kills, {in_save} in a save")


def end_of_ranks(process: object) -> None:
    """kill -9 of torchrun and of every process below it."""
    launcher = psutil.Process(process.pid)
    family = [launcher, *launcher.children(recursive=True)]
    for member in family:
        member.suspend()  # so that none sees another die: all are gone at the same moment
    for member in family:
        member.kill()
    process.communicate(timeout=60)
    psutil.wait_procs(family, timeout=60)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kills_under_torchrun(data: Path, tmp_path: Path) -> None:
    straight, run = tmp_path / "straight", tmp_path / "run"
    options = {"train__steps": 120, "parallel__tp": 2}
    finished(2, arguments(straight, data, **options))
    argv, chance, metrics = (
        arguments(run, data, checkpoint__every=5, **options),
        random.Random(1),
        run / "metrics.jsonl",
    )
    for _ in range(3):
        process, before = torchrun(2, argv), metrics.read_text() if metrics.exists() else ""
        while (
            not metrics.exists()
            or metrics.read_text() in ("", before)
            or len(metrics.read_text()) < len(before)
            or not saved(run)
        ):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        time.sleep(chance.uniform(0.0, 2.0))
        assert process.poll() is None, "the run was at its end before the kill"
        end_of_ranks(process)
    out, err = torchrun(2, argv).communicate(timeout=900)
    assert "resumed   step-" in out, err
    assert rows(run) == rows(straight)
