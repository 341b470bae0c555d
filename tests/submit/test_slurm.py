"""Runs as real Slurm jobs on a private cluster of two nodes train as they would on a large one."""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from pathlib import Path

import pytest

from hybridtrain.cli import commands
from hybridtrain.config import compose
from hybridtrain.data.blend import open_data
from hybridtrain.data.loader import Loader
from hybridtrain.plan.batch import BatchPlan
from hybridtrain.tasks.causal_lm import CausalLM
from tests.runs import arguments, assert_equal_state, finished, rows, summary
from tests.submit.jobs import ROOT, TWO_BY_TWO, outcomes, output, sabotage, submit, wait_for_lines


def test_submit_trains_on_two_nodes(slurm, data, uninterrupted, tmp_path, capfd):
    run = tmp_path / "run"
    job = submit(run, data)
    ended = slurm.wait(job, timeout_s=180)
    assert ended["JobState"] == "COMPLETED", output(run)
    assert rows(run) == uninterrupted
    assert summary(run)["status"] == "finished"
    assert outcomes(run) == ["finished"]
    nodes = {path.parent.name: path for path in run.glob("logs/job-*/life-0/node-*.log")}
    assert nodes
    capfd.readouterr()
    assert commands.run_command("submit", [*arguments(run, data, parallel="tp2_pp2"), *TWO_BY_TWO]) == 2
    assert "the run is finished, 8 of 8 steps are done" in capfd.readouterr().err


def test_a_run_that_is_queued_is_not_queued_a_second_time(slurm, data, tmp_path, capfd):
    run = tmp_path / "run"
    job = submit(run, data, "cluster.sbatch={begin: now+1hour}")
    before = sorted((path, path.read_bytes()) for path in run.rglob("*") if path.is_file())
    capfd.readouterr()
    assert commands.run_command("submit", [*arguments(run, data, parallel="tp2_pp2"), *TWO_BY_TWO]) == 2
    said = capfd.readouterr().err
    assert f"job {job} has this run already, and is PENDING" in said
    assert f"scancel {job}" in said
    assert sorted((path, path.read_bytes()) for path in run.rglob("*") if path.is_file()) == before
    slurm.run("scancel", job)
    slurm.wait(job, timeout_s=30)
    assert submit(run, data, "cluster.sbatch={begin: now+1hour}") != job


@pytest.mark.slow
def test_a_second_job_in_a_run_that_trains_is_refused_and_the_first_goes_on(
    slurm, data, uninterrupted, tmp_path, monkeypatch
):
    """By plain sbatch, which asks nobody; submit refuses it at once."""
    run = tmp_path / "run"
    sabotage(monkeypatch, kind="slow", seconds=1.5)
    first = submit(run, data)
    wait_for_lines(run, 1)
    monkeypatch.setenv("HYBRIDTRAIN_PYTHON", sys.executable)
    monkeypatch.setenv("HYBRIDTRAIN_RANKS", "2")
    second = slurm.run(
        "sbatch",
        "--parsable",
        "--nodes=2",
        "--no-requeue",
        str(ROOT / "slurm/train.sbatch"),
        *arguments(run, data, parallel="tp2_pp2"),
    )
    assert slurm.wait(second, timeout_s=120)["JobState"] == "FAILED", output(run)
    said = (tmp_path / f"slurm-{second}.out").read_text() + output(run)
    assert f"(job {first}) trains here since" in said
    assert slurm.wait(first, timeout_s=120)["JobState"] == "COMPLETED", output(run)
    assert rows(run) == uninterrupted
    assert summary(run)["status"] == "finished"


@pytest.mark.slow
def test_plain_sbatch_trains_too(slurm, data, uninterrupted, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setenv("HYBRIDTRAIN_PYTHON", sys.executable)
    monkeypatch.setenv("HYBRIDTRAIN_RANKS", "2")
    job = slurm.run(
        "sbatch",
        "--parsable",
        "--nodes=2",
        str(ROOT / "slurm/train.sbatch"),
        *arguments(run, data, parallel="tp2_pp2"),
    )
    ended = slurm.wait(job, timeout_s=180)
    assert ended["JobState"] == "COMPLETED", output(run) + (tmp_path / f"slurm-{job}.out").read_text()
    assert rows(run) == uninterrupted


@pytest.mark.slow
def test_modules_of_the_user_reach_the_job_however_it_is_queued(slurm, data, tmp_path, monkeypatch):
    """`submit` and a plain sbatch: the job's own command line permits them, the frozen configuration in the
    run does not name them."""
    (tmp_path / "mine.py").write_text(
        "import hybridtrain as ht\nprint('words on the standard output')\n"
        "ht.register('schedule', 'halved')(lambda step, config, total_steps: 0.5)\n"
    )
    words = ["run.plugins=[mine]", "schedule.kind=halved"]
    jobs = {tmp_path / "one": submit(tmp_path / "one", data, *words)}
    monkeypatch.setenv("HYBRIDTRAIN_PYTHON", sys.executable)
    monkeypatch.setenv("HYBRIDTRAIN_RANKS", "2")
    argv = [*arguments(tmp_path / "two", data, parallel="tp2_pp2"), *words]
    jobs[tmp_path / "two"] = slurm.run(
        "sbatch", "--parsable", "--nodes=2", str(ROOT / "slurm/train.sbatch"), *argv
    )
    for run, job in jobs.items():
        assert slurm.wait(job, timeout_s=180)["JobState"] == "COMPLETED", output(run)
        assert {line["lr"] for line in rows(run)} == {0.0015}
        assert "plugins: []" in (run / "submit/conf/experiment/submitted.yaml").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("slurm")
def test_an_array_of_runs(data, tmp_path, capfd):
    run = tmp_path / "runs/sweep"
    given = [
        text
        for text in arguments(run, data, train__steps=3, parallel="tp2")
        if not text.startswith("run.dir")
    ]
    sizes = ["cluster.ranks_per_node=2", "cluster.health_timeout_s=0", "cluster.array_at_once=2"]
    assert (
        commands.run_command(
            "submit",
            [*given, *sizes, "run.name=sweep", "--multirun", "optim.lr=0.001,0.003,0.01", "run.seed=0,1"],
        )
        == 0
    )
    runs = [tmp_path / f"runs/sweep-{number}" for number in range(6)]
    job = (runs[0] / "submit/job_id").read_text().strip().partition("_")[0]
    end = time.monotonic() + 300
    while [summary(path)["status"] for path in runs] != ["finished"] * 6:
        assert time.monotonic() < end, "\n".join(map(output, runs))
        time.sleep(0.5)
    assert len({json.dumps(rows(path)) for path in runs}) == 6
    capfd.readouterr()
    assert commands.run_command("runs", [f"runs.folder={tmp_path / 'runs'}"]) == 0
    listed = capfd.readouterr().out
    assert listed.count("finished") == 6
    assert f"{job}_0" in listed
    assert (
        commands.run_command("report", ["--compare", *map(str, runs), f"report.out={tmp_path / 'compare'}"])
        == 0
    )
    assert "sweep-5" in (tmp_path / "compare/index.html").read_text()


@pytest.mark.slow
def test_plain_srun_starts_the_trainer(slurm, data, uninterrupted, tmp_path):
    """No torchrun: one process per task, ranks from Slurm's own variables."""
    run = tmp_path / "run"
    slurm.run(
        "srun",
        "--nodes=2",
        "--ntasks=4",
        "--ntasks-per-node=2",
        sys.executable,
        "-m",
        "hybridtrain.train",
        *arguments(run, data, parallel="tp2_pp2"),
    )
    assert rows(run) == uninterrupted


@pytest.mark.slow
def test_4_ranks_then_2_then_4(slurm, data, tmp_path, monkeypatch):
    """One run on two nodes, on one, on two again: state and rows are the same bit for bit at each change,
    losses those of a whole run to 1e-5."""
    whole, run, witness = tmp_path / "whole", tmp_path / "run", tmp_path / "witness"
    witness.mkdir()
    shard = {
        "parallel": "zero3",
        "parallel__dp_shard": -1,
        "train__steps": 12,
        "train__log_every": 1,
        "checkpoint__keep_last": 0,
    }
    finished(4, arguments(whole, data, **shard))
    sabotage(monkeypatch, kind="slow", seconds=0.5, witness=str(witness))
    for nodes, stop_at in ((2, 3), (1, 7), (2, None)):
        argv = [
            *arguments(run, data, **shard),
            "cluster.ranks_per_node=2",
            f"cluster.nodes={nodes}",
            "cluster.health_timeout_s=0",
        ]
        assert commands.run_command("submit", argv) == 0
        job = (run / "submit" / "job_id").read_text().strip()
        if stop_at:
            wait_for_lines(run, stop_at)
            slurm.run("scancel", job)
            slurm.wait(job, timeout_s=120)
            assert summary(run)["status"] == "interrupted", output(run)
    ended = slurm.wait(job, timeout_s=180)
    assert ended["JobState"] == "COMPLETED", output(run)
    for ours, theirs in zip(rows(run), rows(whole), strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["tokens_seen"] == theirs["tokens_seen"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    loaded = sorted(witness.glob("step-*"))
    assert [path.name.rpartition("-")[2] for path in loaded] == ["2", "4"]
    for checkpoint in loaded:
        assert_equal_state(checkpoint, run / "checkpoints" / checkpoint.name[: len("step-00000000")])
    plan = BatchPlan(micro_batch_size=1, seq_len=32, grad_accum=8, global_batch_size=8)
    loader = Loader(
        open_data(compose.compose("train", arguments(run, data)).data, timeout_s=0),
        plan=plan,
        dp_rank=0,
        dp_size=1,
        seed=0,
        vocab=300,
        collate=CausalLM().collate,
    )
    for step in range(12):
        shares = sorted(json.loads(path.read_text()) for path in witness.glob(f"rows-{step}-*.json"))
        assert len(shares) in (2, 4)
        assert [row for _, share in shares for row in share] == loader.row_ids(step).tolist()


WRONG = {
    "degrees": (["parallel.tp=3"], "parallel="),
    "no data": (["data.path=/no/such/data"], "data.path=/no/such/data: there is no such folder"),
    "no partition": (["cluster.partition=nosuch"], "Slurm refuses the job: "),
    "too many nodes": (
        ["cluster.nodes=3", "cluster.ranks_per_node=4", "parallel=ddp", "batch.global_batch_size=12"],
        "cluster.nodes=3: there are 2 nodes",
    ),
    "an option of sbatch that is ours": (["cluster.sbatch={nodes: 7}"], "cluster.sbatch.nodes=7"),
    "a value that sbatch would read": (["cluster.account='a\"; touch hacked'"], "cluster.account="),
    "a line break": (['cluster.qos="x\n#SBATCH --nodes=9"'], "cluster.qos="),
    "a variable that is none": (["cluster.environment={A-B: b}"], "cluster.environment.A-B"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused_when_it_is_submitted(slurm, data, tmp_path, capfd, name):
    extra, words = WRONG[name]
    base = [
        text
        for text in arguments(tmp_path / "run", data, parallel="tp2_pp2")
        if text.partition("=")[0] not in {given.partition("=")[0] for given in extra}
    ]
    sizes = [
        text
        for text in TWO_BY_TWO
        if text.partition("=")[0] not in {given.partition("=")[0] for given in extra}
    ]
    assert commands.run_command("submit", [*base, *sizes, *extra]) == 2
    said = capfd.readouterr().err
    assert words in said, said
    assert not (tmp_path / "run").exists(), "a run that nobody runs"
    assert "try: " in said
    assert slurm.run("squeue", "-h") == ""
    assert not (tmp_path / "hacked").exists()


def test_values_that_mean_something_to_a_shell_reach_the_trainer(slurm, data, tmp_path):
    """Options of the training are frozen as YAML; those of the environment are quoted."""
    evil = "a\"b'c $(touch hacked) `touch hacked`; touch hacked & é \\ #"
    run = tmp_path / "run"
    quoted = "'" + evil.replace("'", "\\'") + "'"
    given = [
        *arguments(run, data, train__steps=1),
        f"model.name={quoted}",
        f"cluster.environment={{EVIL: {quoted}}}",
        "cluster.health_timeout_s=0",
    ]
    assert commands.run_command("submit", given) == 0
    job = (run / "submit" / "job_id").read_text().strip()
    assert slurm.wait(job, timeout_s=120)["JobState"] == "COMPLETED", output(run)
    from hybridtrain.config.compose import read_run

    assert read_run(run / "config.yaml").model.name == evil
    assert f"EVIL={shlex.quote(evil)}" in (run / "submit" / "job.sbatch").read_text()
    assert not list(tmp_path.rglob("hacked"))


def test_a_dry_run_shows_the_script_and_queues_nothing(slurm, data, tmp_path, capfd):
    assert (
        commands.run_command(
            "submit", [*arguments(tmp_path / "run", data, parallel="tp2_pp2"), *TWO_BY_TWO, "--dry-run"]
        )
        == 0
    )
    said = capfd.readouterr().out
    assert "#SBATCH --nodes=2" in said
    assert "to start at" in said
    assert not (tmp_path / "run").exists()
    assert slurm.run("squeue", "-h") == ""


@pytest.mark.slow
def test_the_commands_of_the_documentation(slurm, data, tmp_path, capfd):
    """In order, on this cluster's partition and data, with less work."""
    [block] = re.findall(r"```console\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text(), flags=re.DOTALL)
    here = {
        "cluster=gpu8": "cluster.ranks_per_node=2",
        "cluster.partition=batch": "cluster.partition=main",
        "data.path=/shared/data": f"data.path={data}",
    }
    smaller = ["data.seq_len=64", "train.steps=3", "train.eval_every=3", "checkpoint.every=0"]
    lines = [line.removeprefix("$ hybridtrain ") for line in block.splitlines()]
    assert [line.split()[0] for line in lines] == ["submit", "submit", "runs", "logs"]
    for line in lines:
        name, *argv = shlex.split(line)
        argv = [
            here.pop(text) if text in here and "--dry-run" not in argv else here.get(text, text)
            for text in argv
        ]
        assert commands.run_command(name, [*argv, *(smaller if name == "submit" else [])]) == 0, line
        if name == "submit" and "--dry-run" not in argv:
            job = Path("runs/quickstart/submit/job_id").read_text().strip()
            assert slurm.wait(job, timeout_s=180)["JobState"] == "COMPLETED", output(
                tmp_path / "runs/quickstart"
            )
    assert not here, "a value that the document no longer has"
    assert "finished 3 steps" in capfd.readouterr().out
