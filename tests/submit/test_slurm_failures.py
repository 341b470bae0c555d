"""Slurm jobs that are stopped, lose nodes or ranks, or hang are requeued and go on, or end in a verdict."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest

from hybridtrain.cli import commands
from tests.runs import arguments, rows, summary
from tests.submit.jobs import ROOT, outcomes, output, sabotage, submit, wait_for_lines


@pytest.mark.slow
@pytest.mark.parametrize("slow_save", [False, True])
def test_signalled_it_saves_requeues_and_ends_the_same(
    slurm, data, uninterrupted, tmp_path, monkeypatch, slow_save
):
    """As before its time limit. A checkpoint may take longer than Slurm's KillWait (5 s here)."""
    run = tmp_path / "run"
    sabotage(
        monkeypatch,
        **({"kind": "slow_save", "seconds": 8} if slow_save else {"kind": "slow", "seconds": 0.5}),
    )
    job = submit(run, data)
    wait_for_lines(run, 1 if slow_save else 2)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    ended = slurm.wait(job, timeout_s=240)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), output(run)
    assert outcomes(run) == ["preempted", "finished"]
    assert rows(run) == uninterrupted


@pytest.mark.slow
def test_the_real_time_limit(slurm, data, uninterrupted, tmp_path, monkeypatch):
    run = tmp_path / "run"
    sabotage(monkeypatch, kind="slow", seconds=6.0)
    job = submit(
        run,
        data,
        "cluster.time=00:01:00",
        "cluster.signal_before_s=30",
        "run.stop_before_s=5",
        "cluster.max_restarts=0",
    )
    ended = slurm.wait(job, timeout_s=420)
    assert ended["JobState"] == "COMPLETED", output(run)
    assert int(ended["Restarts"]) >= 1
    assert set(outcomes(run)) == {"preempted", "finished"}
    assert rows(run) == uninterrupted


@pytest.mark.slow
def test_a_node_that_goes_down(slurm, data, uninterrupted, tmp_path, monkeypatch):
    """Slurm itself requeues the job, and tells the ranks to end first."""
    run = tmp_path / "run"
    sabotage(monkeypatch, kind="slow", seconds=0.7)
    job = submit(run, data, checkpoint__every=1)
    wait_for_lines(run, 3)
    slurm.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    ended = slurm.wait(job, timeout_s=240)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), output(run)
    assert rows(run) == uninterrupted


@pytest.mark.slow
def test_a_node_that_vanishes(slurm, data, uninterrupted, tmp_path, monkeypatch):
    """Power off: slurmd and everything it started are gone without a word."""
    run = tmp_path / "run"
    sabotage(monkeypatch, kind="slow", seconds=1.0)
    job = submit(run, data, checkpoint__every=1)
    wait_for_lines(run, 3)
    for process in psutil.process_iter(["pid", "environ"]):
        if (process.info["environ"] or {}).get("SLURMD_NODENAME") == "n2" and (
            process.info["environ"] or {}
        ).get("SLURM_JOB_ID") == job:
            process.kill()
    daemon = slurm.node_daemons["n2"]
    daemon.send_signal(signal.SIGKILL)
    daemon.wait()
    time.sleep(25)
    slurm.start_node("n2")
    ended = slurm.wait(job, timeout_s=240)
    assert ended["JobState"] == "COMPLETED", output(run)
    assert rows(run) == uninterrupted


@pytest.mark.slow
def test_a_killed_rank_costs_one_restart(slurm, data, uninterrupted, tmp_path, monkeypatch):
    run = tmp_path / "run"
    sabotage(monkeypatch, kind="kill", rank=3, step=4, once=str(tmp_path / "once"))
    job = submit(run, data, checkpoint__every=2)
    ended = slurm.wait(job, timeout_s=240)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), output(run)
    assert outcomes(run) == ["failed", "finished"]
    assert rows(run) == uninterrupted
    assert "rank 3" in (run / "failures/life-0/first.txt").read_text()


@pytest.mark.slow
def test_a_hanging_rank_is_found_and_the_job_restarted(slurm, data, uninterrupted, tmp_path, monkeypatch):
    run = tmp_path / "run"
    sabotage(monkeypatch, kind="hang", rank=2, step=4, once=str(tmp_path / "once"))
    job = submit(run, data, checkpoint__every=2, train__max_step_s=5)
    ended = slurm.wait(job, timeout_s=240)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), output(run)
    told = (run / "failures/life-0/first.txt").read_text()
    assert told.startswith("rank 2"), told
    assert "sitecustomize" in told
    assert rows(run) == uninterrupted


@pytest.mark.slow
def test_a_rank_that_always_fails_exhausts_the_budget(slurm, data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    sabotage(monkeypatch, kind="raise", rank=1, step=3)
    job = submit(run, data)
    ended = slurm.wait(job, timeout_s=240)
    assert ended["JobState"] == "FAILED", output(run)
    assert ended["Restarts"] == "1", "the second attempt made no new checkpoint"
    assert outcomes(run) == ["failed", "failed"]
    found = summary(run)
    assert found["status"] == "failed"
    assert found["exit_reason"].startswith("rank 1 on n1: ArithmeticError: planted failure"), found
    [said] = run.glob("submit/slurm-*.out")
    assert "ArithmeticError: planted failure" in said.read_text()


@pytest.mark.slow
def test_a_bad_node_is_named_and_left_out(slurm, data, tmp_path, monkeypatch):
    """n1 cannot write the run's folder; the job that takes over runs on n2 alone."""
    run = tmp_path / "run"
    monkeypatch.setenv("SABOTAGE_NODE", "n1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests/sabotage"), str(ROOT)]))
    argv = [*arguments(run, data, parallel="tp2", cluster__ranks_per_node=2, cluster__health_timeout_s=60)]
    assert commands.run_command("submit", argv) == 0
    first = (run / "submit" / "job_id").read_text().strip()
    slurm.wait(first, timeout_s=120)
    second = (run / "submit" / "job_id").read_text().strip()
    assert second != first, output(run)
    ended = slurm.wait(second, timeout_s=240)
    assert (ended["JobState"], ended["NodeList"]) == ("COMPLETED", "n2"), output(run)
    assert "n1: cannot write" in output(run)


@pytest.mark.slow
def test_after_a_cancellation_the_log_ends_with_the_verdict(slurm, data, tmp_path, monkeypatch, capfd):
    """Not with what the launcher says about the signal; and the list of runs has the states of all
    jobs from one question."""
    run = tmp_path / "runs/run"
    sabotage(monkeypatch, kind="slow", seconds=0.5)
    job = submit(run, data)
    wait_for_lines(run, 2)
    capfd.readouterr()
    assert commands.run_command("runs", [f"runs.folder={tmp_path / 'runs'}"]) == 0
    assert capfd.readouterr().out.splitlines()[1].split()[6:8] == [job, "RUNNING"]
    slurm.run("scancel", job)
    slurm.wait(job, timeout_s=120)
    capfd.readouterr()
    assert commands.run_command("logs", [str(run), "logs.lines=1"]) == 0
    assert (
        capfd.readouterr().out.splitlines()[-1]
        == "cancelled: the job was cancelled; the same command goes on"
    )
    assert outcomes(run) == ["cancelled"]
