"""Submitting and listing where Slurm hangs or answers nonsense, the disk is full, or the files
of a run are damaged."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybridtrain.cli.commands import run_command
from hybridtrain.cli.main import main
from hybridtrain.config import schema
from hybridtrain.config.schema import ClusterConfig
from hybridtrain.errors import UserError
from hybridtrain.submit import _folder, _queue, attempts, create, job, listing, script, slurm
from tests.report.test_damaged import largest_file
from tests.runs import arguments

RUNS = ("good", "not-utf8", "nul", "empty", "other", "a-list", "no-id", "bad-summary", "deep")


def run_folder(path: Path, **summary: object) -> Path:
    (path / "submit").mkdir(parents=True)
    (path / "summary.json").write_text(
        json.dumps({"status": "finished", "steps": 3, "total_steps": 3, "final_loss": 1.25, **summary})
    )
    return path


def commands(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Put shell scripts of these names before everything else on the PATH."""
    folder.mkdir(exist_ok=True)
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_a_broken_run_does_not_hide_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    for name in RUNS:
        run_folder(runs / name)
    entry = {
        "chain": "7",
        "job": "7",
        "life": 0,
        "nodes": "n1",
        "started": 1.0,
        "step_before": 0,
        "of_a_later_version": {"x": 1},
    }
    (runs / "good/submit/lives.json").write_text(json.dumps([entry]))
    (runs / "not-utf8/submit/lives.json").write_bytes(b"\xff\xfe")
    (runs / "nul/submit/job_id").write_bytes(b"\0\0\0")
    (runs / "empty/submit/lives.json").write_text("")
    (runs / "other/submit/lives.json").write_text(json.dumps([{**entry, "job": 7}]))
    (runs / "a-list/submit/lives.json").write_text(json.dumps({"version": 2}))
    (runs / "no-id/submit/job_id").write_text("queued\n")
    (runs / "bad-summary/summary.json").write_text("{")
    (runs / "deep/submit/lives.json").write_text("[" * 200_000)
    assert main(["runs", f"runs.folder={runs}"]) == 0
    listed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(listed) == {"run", *RUNS}
    assert listed["good"].split()[1:8] == ["finished", "3/3", "1.2500", "-", "-", "7", "-"]
    for name in set(RUNS) - {"good"}:
        assert listed[name].split()[1] == "unreadable", listed[name]
        file = {"nul": "submit/job_id", "no-id": "submit/job_id", "bad-summary": "summary.json"}.get(
            name, "submit/lives.json"
        )
        assert f" {file}: it" in listed[name], listed[name]


def test_a_summary_with_texts_for_numbers_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder(
        tmp_path / "runs/odd",
        final_loss="low",
        tokens_per_s=[1],
        steps="many",
        exit_reason="two\nlines \x1b[31m",
    )
    assert main(["runs", f"runs.folder={tmp_path / 'runs'}"]) == 0
    [_, line] = capsys.readouterr().out.splitlines()
    assert line.split()[:5] == ["odd", "finished", "0/3", "-", "-"]
    assert line.endswith(r"two lines \x1b[31m")


def in_a_job(monkeypatch: pytest.MonkeyPatch, run: Path, *, restarts: int) -> None:
    environment = {
        "SLURM_JOB_ID": "9",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_RESTART_COUNT": str(restarts),
        "HYBRIDTRAIN_RUN": str(run),
        "HYBRIDTRAIN_WORLD": "1",
    }
    for key, value in environment.items():
        monkeypatch.setenv(key, value)


@pytest.mark.parametrize(
    "content", [None, b"", b"\xff", b"{}", b'[{"of": "another version"}]', b"[" * 200_000, b"[null]"]
)
def test_a_job_goes_on_without_a_list_of_attempts_that_can_be_read(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_folder(tmp_path / "run", status="preempted")
    in_a_job(monkeypatch, run, restarts=0)
    file = run / "submit/lives.json"
    if content is not None:
        file.write_bytes(content)
    assert job.open_job([]) == 0
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
        assert [path.read_bytes() for path in run.glob("submit/lives.unreadable-*.json")] == [content]
    assert job.close_job(run, code=0, stopped="signal") == job.REQUEUE_CODE
    [attempt] = attempts.read(run)
    assert (attempt.job, attempt.chain, attempt.outcome) == ("9", "9", "preempted")


@pytest.mark.parametrize(("restarts", "code"), [(0, job.REQUEUE_CODE), (3, 1)])
def test_a_full_disk_costs_the_count_of_attempts_not_the_verdict(
    restarts: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_folder(tmp_path / "run", status="running")
    in_a_job(monkeypatch, run, restarts=restarts)
    with largest_file(0):
        assert job.close_job(run, code=1, stopped="no") == code
        assert job.open_job([]) == 2


def test_a_list_of_an_array_that_is_gone_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_a_job(monkeypatch, tmp_path, restarts=0)
    monkeypatch.setenv("HYBRIDTRAIN_RUNS", str(tmp_path / "runs.txt"))
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    for text in (None, "/one/line\n"):
        if text:
            (tmp_path / "runs.txt").write_text(text)
        assert job.open_job([]) == 2
        assert "does not name the run of task 1" in capsys.readouterr().err


HANGS = "exec sleep 30"


def test_a_slurm_that_hangs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands(tmp_path / "bin", monkeypatch, sinfo=HANGS, sbatch=HANGS, squeue=HANGS)
    monkeypatch.setattr(slurm, "PATIENCE_S", 0.3)
    with pytest.raises(UserError, match=r"Slurm cannot be reached from here: sinfo has not answered"):
        slurm.check_nodes(1, partition="")
    with pytest.raises(UserError, match=r"sbatch has not answered"):
        slurm.sbatch(tmp_path / "job", test_only=False)
    run_folder(tmp_path / "runs/one")
    (tmp_path / "runs/one/submit/job_id").write_text("7\n")
    assert main(["runs", f"runs.folder={tmp_path / 'runs'}"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[1].split()[:2] == ["one", "finished"]
    assert (
        "states of jobs are not shown: Slurm cannot be reached from here: squeue has not answered" in said.err
    )


@pytest.mark.parametrize("answer", ["", "Submitted batch job 7", "7;;", "7 8", "\\377"])
def test_what_is_no_job_id_is_not_taken_for_one(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands(
        tmp_path / "bin",
        monkeypatch,
        sbatch=f"printf {shlex.quote(answer)}",
        sinfo="printf 'rubbish\\377\\n\\0'",
    )
    with pytest.raises(UserError, match="which is no job id"):
        slurm.sbatch(tmp_path / "job", test_only=False)
    slurm.check_nodes(5, partition="")


def test_a_job_id_with_its_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands(tmp_path / "bin", monkeypatch, sbatch="echo '71;here'")
    assert slurm.sbatch(tmp_path / "job", test_only=False) == "71"


@pytest.mark.parametrize(
    ("reason", "option"),
    [
        ("Invalid --time specification", "cluster.time="),
        ("invalid partition specified: x", "cluster.partition="),
    ],
)
def test_slurms_reason_names_the_option(
    reason: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands(tmp_path / "bin", monkeypatch, sbatch=f"echo 'sbatch: error: {reason}' >&2; exit 1")
    with pytest.raises(UserError, match=option):
        slurm.sbatch(tmp_path / "job", test_only=True)


def test_the_states_of_all_runs_are_one_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(20):
        run_folder(tmp_path / f"runs/run-{number}")
        (tmp_path / f"runs/run-{number}/submit/job_id").write_text(f"7_{number}\n")
    log = tmp_path / "asked"
    commands(
        tmp_path / "bin",
        monkeypatch,
        squeue=f'echo "$@" >> {log}; for n in 0 3; do echo 7_$n PENDING; done; echo 99 RUNNING',
        scontrol="exit 1",
    )
    assert main(["runs", f"runs.folder={tmp_path / 'runs'}"]) == 0
    assert len(log.read_text().splitlines()) == 1
    states = {line.split()[0]: line.split()[7] for line in capsys.readouterr().out.splitlines()[1:]}
    assert [name for name, state in states.items() if state == "PENDING"] == ["run-0", "run-3"]


def test_processes_are_refused_in_words_of_the_cluster(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands(tmp_path / "bin", monkeypatch, sinfo="echo 9", sbatch="exit 1")
    argv = arguments(tmp_path / "run", data, parallel="tp2_pp2", cluster__nodes=3, cluster__ranks_per_node=2)
    assert run_command("submit", argv) == 2
    said = capsys.readouterr().err
    assert (
        "these degrees take a multiple of 4 processes, and 3 x 2 (cluster.nodes x ranks on each) are 6"
        in said
    )
    assert "try:     cluster.nodes=2" in said
    assert "torchrun" not in said


def test_a_dry_run_ends_with_what_matters(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands(
        tmp_path / "bin", monkeypatch, sinfo="echo 9", sbatch="echo 'sbatch: Job 5 to start at noon' >&2"
    )
    assert run_command("submit", [*arguments(tmp_path / "run", data), "run.name=mine", "--dry-run"]) == 0
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert lines[-3:] == [
        f"run       {tmp_path}/run",
        "mine: single on 1 process",
        "sbatch: Job 5 to start at noon (nothing was queued)",
    ]
    assert not (tmp_path / "run").exists()


def test_a_dry_run_shows_the_directory_that_the_run_would_have(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the default one holds another run, the next number, as without --dry-run."""
    commands(
        tmp_path / "bin", monkeypatch, sinfo="echo 9", sbatch="case $1 in --test-only) ;; *) echo 5;; esac"
    )
    monkeypatch.chdir(tmp_path)
    given = [*(text for text in arguments(tmp_path, data) if not text.startswith("run.dir")), "run.name=mine"]
    assert run_command("submit", given) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert run_command("submit", [*given, "optim.lr=0.5", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"run       {tmp_path}/runs/mine-2; runs/mine holds another run (optim.lr)\n" in shown
    assert not (tmp_path / "runs/mine-2").exists()
    assert run_command("submit", [*given, "optim.lr=0.5"]) == 0
    assert (tmp_path / "runs/mine-2/submit/job.sbatch").read_text() == shown[: shown.index("\nrun       ")]


def test_a_slurm_out_of_reach_is_said_before_a_corpus_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands(
        tmp_path / "bin",
        monkeypatch,
        sinfo="exit 1",
        sbatch="echo 'sbatch: error: Unable to contact slurm controller' >&2; exit 1",
    )
    line = [
        "experiment=quickstart",
        f"data.path={tmp_path / 'shared'}",
        f"run.dir={tmp_path / 'run'}",
        "cluster.ranks_per_node=4",
    ]
    assert run_command("submit", line) == 2
    assert "Slurm cannot be reached from here" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_an_array_has_a_folder_of_its_own(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the runs are called; a second sweep does not replace the list that jobs of the
    first one still read."""
    commands(
        tmp_path / "bin", monkeypatch, sinfo="echo 9", sbatch="case $1 in --test-only) ;; *) echo 5;; esac"
    )
    monkeypatch.chdir(tmp_path)
    given = [text for text in arguments(tmp_path, data) if not text.startswith("run.dir")]
    assert run_command("submit", [*given, "run.name=a/b", "--multirun", "optim.lr=0.1,0.2"]) == 0, (
        capsys.readouterr().err
    )
    folder = tmp_path / "runs/a/arrays/a_b-0"
    first = (folder / script.RUNS).read_text()
    assert first.split() == [str(tmp_path / f"runs/a/b-{number}") for number in range(2)]
    others = [tmp_path / "runs/a/b-2", tmp_path / "runs/a/b-3"]
    assert _folder(others, name="a/b-0").name == "a_b-0-2"
    assert _folder([Path(line) for line in first.split()], name="a/b-0") == folder


def test_a_disk_without_space_is_refused_while_submitting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands(tmp_path / "bin", monkeypatch, sbatch="echo 5")
    config = schema.Config()
    config.run.dir = str(tmp_path / "run")
    with largest_file(0), pytest.raises(UserError, match="larger than is allowed"):
        create.write_config(config, tmp_path / "run")
    with largest_file(0), pytest.raises(UserError, match="larger than is allowed"):
        _queue("text", folder=tmp_path / "run/submit", runs=[tmp_path / "run"])


def test_half_letters_are_refused_and_other_bytes_kept(tmp_path: Path) -> None:
    said = {"name": "x", "folder": tmp_path, "work_dir": tmp_path, "stop_signal": "USR1", "plugins": []}
    with pytest.raises(UserError, match=r"cluster\.environment\.WORDS='a.ud800b'"):
        script.render(
            ClusterConfig(environment={"WORDS": "a\ud800b"}), **said, python="python", runs=[tmp_path / "run"]
        )
    odd = os.fsdecode(b"/opt/py\xffthon")
    text = script.render(ClusterConfig(), **said, python=odd, runs=[tmp_path / "run"])
    head = script.encode(text).partition(b"# --- job ---")[0]
    shown = subprocess.run(
        ["bash"], input=head + b'printf %s "$HYBRIDTRAIN_PYTHON"', capture_output=True, check=True
    ).stdout
    assert shown == b"/opt/py\xffthon"


def test_names_that_are_no_text_are_listed(tmp_path: Path) -> None:
    with contextlib.suppress(OSError):
        run_folder(tmp_path / "runs" / os.fsdecode(b"x\xff"))
        environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PATH": "/usr/bin:/bin"}
        line = [sys.executable, "-m", "hybridtrain.cli", "runs", f"runs.folder={tmp_path / 'runs'}"]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
        assert r"x\udcff  finished" in done.stdout


def test_an_empty_log_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path / "run")
    (run / "logs").mkdir()
    (run / "logs/rank-0.log").write_text("")
    assert main(["logs", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'logs/rank-0.log'} is empty so far\n"
    (run / "logs/rank-0.log").write_text("line\n" * 300_000 + "the end\n")
    assert main(["logs", str(run), "logs.lines=2"]) == 0
    assert capsys.readouterr().out == "line\nthe end\n"


def test_logs_end_when_a_job_was_cancelled(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", status="preempted")
    attempts.write(run, [attempts.Attempt("7", "7", 0, "n1", 1.0, 0)])
    assert not listing._has_ended(run), "it may be requeued"
    attempts.write(run, [attempts.Attempt("7", "7", 0, "n1", 1.0, 0, ended=2.0, outcome="cancelled")])
    assert listing._has_ended(run)


@pytest.mark.parametrize("name", ["report", "logs", "export", "evaluate", "generate"])
def test_a_folder_that_is_no_run_is_refused_alike(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder(tmp_path / "there")
    for folder, problem in (
        (tmp_path / "none", "there is no such folder"),
        (tmp_path / "there/submit", "there is no config.yaml, summary.json or metrics.jsonl"),
    ):
        assert main([name, str(folder)]) == 2
        said = capsys.readouterr().err
        assert f"run.dir={folder}: {problem}" in said
    assert main([name, str(tmp_path / "none")]) == 2
    assert f"try:     hybridtrain {name} {tmp_path / 'there'}" in capsys.readouterr().err


def test_a_thousand_runs_are_listed_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(1000):
        run_folder(tmp_path / f"runs/run-{number}")
        (tmp_path / f"runs/run-{number}/checkpoints/step-00000003").mkdir(parents=True)
    begin = time.process_time()
    assert main(["runs", f"runs.folder={tmp_path / 'runs'}"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1001
    assert time.process_time() - begin < 5
