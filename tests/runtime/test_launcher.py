"""Ranks end with their launcher, and the same command goes on; a launcher may restart ranks;
`hybridtrain train --nproc N`."""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hybridtrain.runtime import spawn
from tests.runs import arguments, finished, four_parts, rows, summary, torchrun


def ranks_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of a launcher, once they have their variables."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        children = psutil.Process(launcher.pid).children()
        if len(children) == 2:
            return children
        time.sleep(0.02)
    raise AssertionError("the launcher starts no ranks")


def wait_for(run: Path, *, lines: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while (
        not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < lines
    ):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def nproc(argv: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hybridtrain.cli", "train", "--nproc", "2", *argv]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("start", [nproc, lambda argv: torchrun(2, argv)], ids=["nproc", "torchrun"])
def test_a_launcher_that_is_killed_takes_its_ranks_along_and_the_same_command_goes_on(start, data, tmp_path):
    straight, run = tmp_path / "straight", tmp_path / "run"
    options = {"train__steps": 24, "checkpoint__every": 3}
    finished(2, arguments(straight, data, **options))
    argv = arguments(run, data, **options)
    launcher = start(argv)
    ranks = ranks_of(launcher)
    wait_for(run, lines=4, process=launcher)
    launcher.kill()
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive, "ranks train on without their launcher"
    out, err = start(argv).communicate(timeout=180)
    assert "resumed   step-" in out, err
    assert rows(run) == rows(straight)
    assert summary(run)["status"] == "finished"


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "kills", [pytest.param(5, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.table)]
)
def test_kills_of_torchrun_alone_at_random_moments(data, tmp_path, kills):
    """The same command each time at once: old ranks may be alive for a moment, and the lock is a
    dead process's by then."""
    straight, run = tmp_path / "straight", tmp_path / "run"
    options = {"train__steps": 200, "checkpoint__every": 2}
    finished(2, arguments(straight, data, **options))
    argv, chance = arguments(run, data, **options), random.Random()
    for _ in range(kills):
        launcher = torchrun(2, argv)
        time.sleep(chance.uniform(1.0, 14.0))
        launcher.kill()
        launcher.stdout.close()
        launcher.stderr.close()
        launcher.wait()
    out, err = torchrun(2, argv).communicate(timeout=600)
    assert summary(run)["status"] == "finished", out + err
    assert rows(run) == rows(straight)


@pytest.mark.slow
def test_a_process_that_no_launcher_started_outlives_its_parent(data, tmp_path):
    """As with nohup in a shell that is closed."""
    run = tmp_path / "run"
    argv = [*arguments(run, data, train__steps=6), "batch.micro_batch_size=8"]
    shell = subprocess.Popen(
        [
            "bash",
            "-c",
            'nohup "$@" >/dev/null 2>&1 & echo $!; sleep 60',
            "_",
            sys.executable,
            "-m",
            "hybridtrain.train",
            *argv,
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    trainer = psutil.Process(int(shell.stdout.readline()))
    shell.kill()
    shell.wait()
    psutil.wait_procs([trainer], timeout=120)
    assert summary(run)["status"] == "finished"


@pytest.mark.slow
def test_torchrun_restarts_ranks(data, tmp_path):
    """Its store outlives the attempt: what the last one has left there must not be taken for this one's."""
    straight, run = tmp_path / "straight", tmp_path / "run"
    options = {"train__steps": 24, "checkpoint__every": 3}
    finished(2, arguments(straight, data, **options))
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "2",
    ]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "hybridtrain.train", *arguments(run, data, **options)]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for lines in (8, 16):
        wait_for(run, lines=lines, process=process)
        ranks = {rank.environ().get("RANK"): rank for rank in ranks_of(process)}
        ranks["1"].kill()
        psutil.wait_procs([ranks["1"]], timeout=30)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("resumed   step-") == 2, out
    assert rows(run) == rows(straight)


# -- hybridtrain train --nproc N -----------------------------------------------------------------------------


def test_a_refusal_is_the_last_thing_that_nproc_prints(data, tmp_path):
    process = nproc(arguments(tmp_path / "run", data, run__resume="required"))
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert four_parts(err, "run.resume").startswith("hybridtrain train: run.resume=required")
    assert len(err.splitlines()) == 3, err


def test_ctrl_c_saves_and_ends_without_a_traceback(data, tmp_path):
    run = tmp_path / "run"
    process = nproc(arguments(run, data, train__steps=5000))
    wait_for(run, lines=3, process=process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert "stopped after" in out.splitlines()[-1]
    assert summary(run)["status"] == "interrupted"


def test_a_refusal_that_every_rank_meets_is_said_once_by_nproc(data, tmp_path):
    process = nproc(arguments(tmp_path / "run", data, model__config__vocab_size=100))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.count("holds token id") == 1, err
    assert "[rank 1]" not in err


def test_a_rank_that_dies_is_named_by_nproc(data, tmp_path):
    run = tmp_path / "run"
    process = nproc(arguments(run, data, train__steps=5000))
    wait_for(run, lines=3, process=process)
    ranks = {rank.environ().get("RANK"): rank for rank in ranks_of(process)}
    ranks["1"].kill()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGKILL
    assert err.splitlines()[-1] == f"hybridtrain: rank 1 (process {ranks['1'].pid}) was ended by SIGKILL"
    assert "rank 1" in str(summary(run)["exit_reason"])


def test_a_rank_that_ends_without_a_word_before_it_begins_is_named(data, tmp_path, monkeypatch):
    """A library, or a site's own start-up file, may end a process while Python imports."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('RANK') == '1':\n    os._exit(3)\n"
    )
    monkeypatch.setattr(spawn, "OTHERS_S", 0.0)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert spawn.start("hybridtrain.train", arguments(tmp_path / "run", data), processes=2) == 3
    assert "hybridtrain: rank 1 (process" in said.getvalue()
    assert said.getvalue().endswith("ended with exit code 3\n")
    assert not (tmp_path / "run").exists()
