"""Commands that meet in one run directory: one trains, the other is refused by name or is another run; a run
that was killed is told from one that runs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from hybridtrain.cli import commands
from hybridtrain.parallel import mesh
from hybridtrain.run import holder, lock
from tests.ranks import run_ranks
from tests.runs import Ended, arguments, finished, on_this_rank, rows, summary


def alone(argv_of: list[list[str]], folder: Path, starts: list[float], kind: str) -> Ended:
    """On each forked process: a command of its own, as one process without a launcher, begun at its time.

    `kind`: see KINDS.
    """
    number = int(os.environ["RANK"])
    lock.FLOCK = kind == "flock"
    if kind == "hosts":
        holder.BEAT_S = 0.5
        holder._machine = lambda: f"machine {number}"  # type: ignore[assignment]
    mesh.disconnect()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    os.chdir(folder)
    time.sleep(max(0.0, starts[number] - time.time()))
    return on_this_rank(argv_of[number])


KINDS = ("flock", "no flock", "hosts")
"""On one machine with and without flock; on two machines whose file system carries no flock, so that they
know of each other by beats alone."""


def together(argv_of: list[list[str]], folder: Path, *, apart_s: float, kind: str) -> list[Ended]:
    first = time.time() + 0.5
    return run_ranks(
        len(argv_of),
        alone,
        argv_of,
        folder,
        [first + apart_s * number for number in range(len(argv_of))],
        kind,
    )


def check_double_start(ended: list[Ended], run: Path, *, steps: int) -> None:
    assert sorted(one.code for one in ended) == [0, 2], ended
    [refused] = [one for one in ended if one.code == 2]
    assert f"run.dir={run}: process " in refused.err
    assert " trains here since " in refused.err
    assert "free some space" not in refused.err
    assert [row["step"] for row in rows(run)] == list(range(1, steps + 1))
    assert summary(run)["status"] == "finished"
    assert not (run / lock.NAME).exists()


def test_of_two_commands_in_one_directory_one_trains(data: Path, tmp_path: Path) -> None:
    argv = arguments(tmp_path / "run", data, train__steps=12, checkpoint__every=3)
    check_double_start(
        together([argv, argv], tmp_path, apart_s=0.0, kind="flock"), tmp_path / "run", steps=12
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_double_starts(data: Path, tmp_path: Path, kind: str) -> None:
    """Twenty in all, from the same moment to a fifth of a second apart.

    Who listens for another host's beats needs that host to train on.
    """
    steps = 300 if kind == "hosts" else 8
    for number in range(4 if kind == "hosts" else 8):
        run = tmp_path / f"run-{number}"
        argv = arguments(run, data, train__steps=steps, checkpoint__every=steps // 4, checkpoint__keep_last=1)
        check_double_start(
            together([argv, argv], tmp_path, apart_s=0.03 * number, kind=kind), run, steps=steps
        )


def test_two_new_runs_in_the_default_folder_have_two_directories(data: Path, tmp_path: Path) -> None:
    given = [
        text
        for text in arguments(tmp_path, data, train__steps=2, run__name="both")
        if not text.startswith("run.dir")
    ]
    ended = together([[*given, "run.seed=1"], [*given, "run.seed=2"]], tmp_path, apart_s=0.0, kind="flock")
    assert [one.code for one in ended] == [0, 0], ended
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["both", "both-2"]
    assert [len(rows(path)) for path in sorted((tmp_path / "runs").iterdir())] == [2, 2]


def killed_after_two_lines(argv: list[str], run: Path) -> Ended:
    import signal
    import threading

    def watch() -> None:
        while (
            not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 2
        ):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    return on_this_rank(argv)


def test_a_killed_run_is_told_from_one_that_runs_and_the_next_start_notes_it(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from tests.ranks import RankFailed

    run = tmp_path / "run"
    argv = arguments(run, data, train__steps=300)
    with pytest.raises(RankFailed, match="died without a word"):
        run_ranks(1, killed_after_two_lines, argv, run)
    assert summary(run)["status"] == "running", "nobody could say how it ended"
    capfd.readouterr()
    assert commands.run_command("runs", [f"runs.folder={tmp_path}"]) == 0
    listed = capfd.readouterr().out
    assert "ended without a report" in listed
    assert "running" not in listed
    dead = json.loads((run / lock.NAME).read_text())["pid"]
    said = finished(1, [*argv, "train.steps=3"]).out
    assert f"the attempt before (process {dead} on " in said
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events] == ["started", "failed", "started", "checkpoint", "finished"]
    assert "ended without a report" in events[1]["detail"]
