"""A run stops when it is told to, keeps what it did, and goes on as if nothing had been; a run that fails
says who failed first."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from hybridtrain.config import checks
from hybridtrain.config.compose import compose
from hybridtrain.errors import UserError
from hybridtrain.runtime import failure
from tests.ranks import RankFailed, run_ranks
from tests.runs import Ended, arguments, checkpoints, finished, on_this_rank, rows, summary, torchrun
from tests.sabotage.sitecustomize import plant

SLOW = {"kind": "slow", "seconds": 0.2}


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    run = tmp_path_factory.mktemp("whole") / "run"
    finished(2, arguments(run, data))
    return rows(run)


def told(argv: list[str], run: Path, number: int, plan: dict[str, Any]) -> Ended:
    """On each rank: the run; rank 1 alone gets the signal when two steps are done."""
    plant(plan)
    if os.environ["RANK"] == "1":
        import threading

        def watch() -> None:
            while (
                not (run / "metrics.jsonl").exists()
                or len((run / "metrics.jsonl").read_text().splitlines()) < 2
            ):
                time.sleep(0.01)
            os.kill(os.getpid(), number)

        threading.Thread(target=watch, daemon=True).start()
    return on_this_rank(argv)


@pytest.mark.parametrize(
    "name", ["USR1", "INT", *(pytest.param(name, marks=pytest.mark.slow) for name in ("TERM", "USR2"))]
)
def test_a_signal_to_one_rank_stops_all_after_the_same_step(name, data, uninterrupted, tmp_path):
    run = tmp_path / "run"
    argv = arguments(run, data, run__stop_signal=name if name.startswith("USR") else "USR1")
    ended = run_ranks(2, told, argv, run, getattr(signal, f"SIG{name}"), SLOW)
    assert [rank.code for rank in ended] == [0, 0], ended
    assert "stopped after" in ended[0].out
    stood = summary(run)
    status = "preempted" if name.startswith("USR") else "interrupted"
    assert stood["status"] == status
    assert stood["exit_reason"] == (
        "stopped by Ctrl-C (SIGINT received)" if name == "INT" else f"SIG{name} received"
    )
    assert 2 <= stood["steps"] < 8
    assert checkpoints(run) == [f"step-{stood['steps']:08d}"]
    events = [json.loads(line)["kind"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert events == ["started", "checkpoint", status]
    finished(2, argv)
    assert rows(run) == uninterrupted
    assert summary(run)["status"] == "finished"


def test_the_deadline_stops_a_run_in_time(data, uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRIDTRAIN_DEADLINE", str(time.time() + 30))
    run = tmp_path / "run"
    argv = arguments(run, data)
    finished(2, [*argv, "run.stop_before_s=3600"])
    assert summary(run)["status"] == "preempted"
    assert summary(run)["exit_reason"] == "the job's time is nearly up"
    assert summary(run)["steps"] == 1, "a run does a step in each life, or it would never end"
    monkeypatch.delenv("HYBRIDTRAIN_DEADLINE")
    finished(2, argv)
    assert rows(run) == uninterrupted


def test_told_to_stop_before_the_ranks_take_signals(data, uninterrupted, tmp_path, monkeypatch):
    """Slurm may signal a job a minute early, while its ranks start: the job script leaves a file for them."""
    run, file = tmp_path / "run", tmp_path / "stopped"
    monkeypatch.setenv("HYBRIDTRAIN_STOPPED", str(file))
    file.touch()
    argv = arguments(run, data)
    finished(2, argv)
    assert (summary(run)["status"], summary(run)["exit_reason"]) == ("preempted", "SIGUSR1 received")
    assert summary(run)["steps"] == 1
    file.unlink()
    finished(2, argv)
    assert rows(run) == uninterrupted


@pytest.mark.slow
def test_torchrun_told_to_end_leaves_a_checkpoint_and_goes_on(data, uninterrupted, tmp_path, monkeypatch):
    """As by Ctrl-C, or a container that is stopped: torchrun passes TERM on to its ranks."""
    monkeypatch.setenv(
        "PYTHONPATH",
        os.pathsep.join([str(Path(__file__).parents[1] / "sabotage"), os.environ.get("PYTHONPATH", "")]),
    )
    monkeypatch.setenv("SABOTAGE", json.dumps({"kind": "slow", "seconds": 0.5}))
    run = tmp_path / "run"
    argv = arguments(run, data)
    process = torchrun(2, argv)
    wait_for(run, lines=2, process=process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert summary(run)["status"] == "interrupted"
    monkeypatch.delenv("SABOTAGE")
    finished(2, argv)
    assert rows(run) == uninterrupted


def wait_for(run: Path, *, lines: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while (
        not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < lines
    ):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_second_signal_ends_it_at_once(data, tmp_path):
    """Also while the main thread sleeps, or waits in a collective, where no Python handler runs."""
    run = tmp_path / "run"
    script = (
        "import sys, json; from tests.sabotage.sitecustomize import plant; "
        "from hybridtrain.cli.commands import run_command\n"
        "plant({'kind': 'hang', 'rank': 0, 'step': 2}); sys.exit(run_command('train', sys.argv[1:]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments(run, data)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(run, lines=2, process=process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)  # a scheduler and a launcher both send it: still one
    time.sleep(2.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 128 + signal.SIGTERM


def sabotaged(argv: list[str], plan: dict[str, Any]) -> Ended:
    plant(plan)
    return on_this_rank(argv)


@pytest.mark.parametrize("layout", [{}, {"parallel__pp": 2}])
def test_a_rank_that_raises_is_named_as_the_first(layout, data, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(RankFailed):
        run_ranks(2, sabotaged, arguments(run, data, **layout), {"kind": "raise", "rank": 1, "step": 3})
    found = failure.root_cause(run / "failures/life-0", world_size=2)
    assert found is not None
    assert (found.rank, found.what) == (1, "ArithmeticError: planted failure")
    assert "planted failure" in found.detail
    assert found.node == failure.node()
    assert summary(run)["exit_reason"] == str(found)
    assert json.loads((run / "failures/life-0/rank-1.json").read_text())["step"] == 3, (
        "steps done, on a rank that is not 0"
    )


def test_a_rank_that_was_killed_is_named(data, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(RankFailed):
        run_ranks(2, sabotaged, arguments(run, data), {"kind": "kill", "rank": 1, "step": 3})
    found = failure.root_cause(run / "failures/life-0", world_size=2)
    assert found is not None
    assert found.rank == 1
    assert "killed from outside" in found.what


@pytest.mark.parametrize(
    "layout",
    [
        {},
        *(
            pytest.param(layout, marks=pytest.mark.slow)
            for layout in ({"parallel__pp": 2}, {"parallel": "zero3"})
        ),
    ],
)
def test_a_rank_that_hangs_ends_all_with_their_stacks_and_is_told_from_those_that_wait(
    layout, data, tmp_path
):
    run = tmp_path / "run"
    began = time.monotonic()
    with pytest.raises(RankFailed):
        run_ranks(
            2,
            sabotaged,
            arguments(run, data, train__max_step_s=4, **layout),
            {"kind": "hang", "rank": 1, "step": 3},
        )
    assert time.monotonic() - began < 60
    found = failure.root_cause(run / "failures/life-0", world_size=2)
    assert found is not None
    assert found.rank == 1, found
    assert "max_step_s" in found.what
    assert "sitecustomize" in found.detail
    assert not [
        child
        for child in psutil.Process().children(recursive=True)
        if child.status() == "zombie" and "hybridtrain.train" in child.name()
    ]


@pytest.mark.parametrize(
    "text",
    ["run.stop_signal=KILL", "run.stop_signal=nonsense", "run.stop_before_s=-1", "train.max_step_s=nan"],
)
def test_what_cannot_be_obeyed_is_refused(text):
    with pytest.raises(UserError, match=re.escape(text.partition("=")[0])) as told:
        checks.check(compose("train", ["data.path=x", "model=tiny", "train.steps=1", text]))
    assert "try:" in str(told.value)
