"""kill -9 of every rank at any moment, then the same command: the run ends with the losses of an uninterrupted one, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests import ranks
from tests.ranks import RankFailed
from tests.runs import arguments, checkpoints, corpus, finished, on_ranks, on_this_rank, rows, summary, torchrun

TP_PP = {"parallel__pp": 2, "parallel__tp": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("corpus"))


def killed_after(world_size: int, argv: list[str], *, seconds: float) -> bool:
    """Start the run and kill all ranks after `seconds`; False when it was at its end before."""
    try:
        on_ranks(world_size, argv, timeout_s=seconds)
    except RankFailed as error:
        if "did not finish within" not in str(error):
            raise
        return True
    return False


def unfinished_save(run: Path) -> bool:
    """Whether a save was cut short."""
    return any((run / "checkpoints").glob("*.partial"))


def dies_in_save(argv: list[str], run: Path) -> object:
    """On each rank: the run, until a save is seen under way; then this process kills itself."""
    seen = {path.name for path in (run / "checkpoints").glob("*.partial")}

    def watch() -> None:
        while not any(path.name not in seen for path in (run / "checkpoints").glob("*.partial")):
            time.sleep(0.0005)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    return on_this_rank(argv)


def test_two_kills_one_of_them_in_a_save(data: Path, tmp_path: Path) -> None:
    straight, run = tmp_path / "straight", tmp_path / "run"
    finished(2, arguments(straight, data, train__steps=24, checkpoint__every=4))
    argv = arguments(run, data, train__steps=24, checkpoint__every=4)
    with pytest.raises(RankFailed, match="died without a word"):
        ranks.run_ranks(2, dies_in_save, argv, run)
    assert unfinished_save(run)
    assert summary(run)["status"] == "running", "nothing could be said about the end"
    assert killed_after(2, argv, seconds=2.0) or summary(run)["status"] == "finished"
    finished(2, argv)
    assert rows(run) == rows(straight)
    assert checkpoints(run) == checkpoints(straight)
    assert summary(run)["status"] == "finished"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("world_size", "kills", "options"), [(2, 20, {}), (4, 6, TP_PP)])
def test_kills_at_random_moments(data: Path, tmp_path: Path, world_size: int, kills: int, options: dict[str, object]) -> None:
    straight, run = tmp_path / "straight", tmp_path / "run"
    options = {"train__steps": 25 * kills, "train__eval_every": 25, "train__eval_rows": 8, **options}
    finished(world_size, arguments(straight, data, **options))
    argv, chance = arguments(run, data, checkpoint__every=2, **options), random.Random(0)
    done = in_save = from_start = 0
    while done < kills:
        seconds = chance.uniform(0.5, 4.0)
        assert killed_after(world_size, argv, seconds=seconds), f"the run ended after {done} kills: give it more steps"
        done += 1
        in_save += unfinished_save(run)
        from_start += not (run / "checkpoints").is_dir() or not any((run / "checkpoints").glob("step-*[0-9]"))
        print(f"kill {done} after {seconds:.1f} s: {checkpoints(run) if (run / 'checkpoints').is_dir() else []}")
    for _ in range(8):  # chance decides how many of the kills above hit a save; these do for certain
        if in_save >= 3:
            break
        with pytest.raises(RankFailed, match="died without a word"):
            ranks.run_ranks(world_size, dies_in_save, argv, run)
        in_save += unfinished_save(run)
    assert in_save >= 3
    finished(world_size, argv)
    assert rows(run) == rows(straight)
    print(f"{done} kills, {in_save} in a save, {from_start} before the first checkpoint")


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
    options = {"train__steps": 200, "parallel__tp": 2}
    finished(2, arguments(straight, data, **options))
    argv, chance, metrics = arguments(run, data, checkpoint__every=5, **options), random.Random(1), run / "metrics.jsonl"
    for _ in range(3):
        process, before = torchrun(2, argv), metrics.read_text() if metrics.exists() else ""
        while not metrics.exists() or metrics.read_text() in ("", before) or len(metrics.read_text()) < len(before):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        time.sleep(chance.uniform(0.0, 2.0))
        assert process.poll() is None, "the run was at its end before the kill"
        end_of_ranks(process)
    out, err = torchrun(2, argv).communicate(timeout=300)
    assert "resumed   step-" in out, err
    assert rows(run) == rows(straight)
