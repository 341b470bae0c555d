"""What becomes of a job, without a scheduler: verdicts, the script, the health check's
words, the list of runs."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import subprocess
from pathlib import Path

import pytest

from hybridtrain.cli import commands
from hybridtrain.config.schema import ClusterConfig
from hybridtrain.errors import UserError
from hybridtrain.runtime import failure
from hybridtrain.submit import attempts, health, script, slurm
from hybridtrain.submit.attempts import DONE, FAILED, REQUEUE, Attempt
from tests.runs import arguments, corpus, finished


def chain(*ends: tuple[str, int]) -> list[Attempt]:
    """Attempts of one chain: (outcome, newest checkpoint at the end)."""
    found, before = [], 0
    for number, (outcome, step) in enumerate(ends):
        found.append(
            Attempt("7", "7", number, "n[1-2]", 0.0, before, ended=1.0, step_after=step, outcome=outcome)
        )
        before = step
    return found


@pytest.mark.parametrize(
    ("ends", "decision"),
    [
        ([("finished", 8)], DONE),
        ([("preempted", 3)], REQUEUE),
        ([("preempted", 0)], REQUEUE),
        ([("preempted", 0), ("preempted", 0)], FAILED),
        ([("preempted", 3), ("preempted", 3)], REQUEUE),
        ([("preempted", 3), ("preempted", 3), ("preempted", 3)], FAILED),
        ([("preempted", n) for n in range(1, 40)], REQUEUE),
        ([("cancelled", 3)], FAILED),
        ([("failed", 0)], REQUEUE),
        ([("failed", 0), ("failed", 0)], FAILED),
        ([("failed", 2), ("failed", 4), ("failed", 6)], REQUEUE),
        ([("failed", 2), ("failed", 4), ("failed", 6), ("failed", 8)], FAILED),
        ([("failed", 2), ("preempted", 4), ("preempted", 6), ("failed", 8)], REQUEUE),
        ([("", 2), ("failed", 4)], REQUEUE),
    ],
)
def test_the_verdict(ends, decision):
    assert attempts.decide(chain(*ends), max_restarts=3)[0] == decision


def test_a_new_chain_has_a_budget_of_its_own():
    before = chain(("failed", 0), ("failed", 0))
    again = Attempt("9", "9", 0, "n1", 2.0, 0, ended=3.0, step_after=0, outcome="failed")
    assert attempts.decide([*before, again], max_restarts=3)[0] == REQUEUE


def rendered(tmp_path: Path, *, runs: int = 1, **options: object) -> str:
    cluster = ClusterConfig(**options)  # type: ignore[arg-type]
    paths = [tmp_path / f"run-{number}" for number in range(runs)]
    return script.render(
        cluster,
        name="a run",
        folder=tmp_path / "submit",
        work_dir=tmp_path,
        python="/opt/python",
        stop_signal="USR2",
        plugins=[],
        runs=paths,
    )


def test_the_script_has_what_was_asked_for(tmp_path):
    text = rendered(
        tmp_path,
        partition="batch",
        nodes=4,
        gpus_per_node=8,
        time="2-00:00:00",
        sbatch={"exclusive": "", "reservation": "night"},
        modules=["cuda/13.0"],
    )
    head = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    for option in (
        "--partition=batch",
        "--nodes=4",
        "--gpus-per-node=8",
        "--time=2-00:00:00",
        "--exclusive",
        "--reservation=night",
        "--signal=B:USR2@120",
        "--requeue",
    ):
        assert option in head
    assert "--job-name=a_run" in head
    assert "export HYBRIDTRAIN_RANKS=8" in text
    assert "module load cuda/13.0" in text
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_several_runs_are_an_array(tmp_path):
    text = rendered(tmp_path, runs=6, array_at_once=2)
    assert "#SBATCH --array=0-5%2" in text
    assert "HYBRIDTRAIN_RUNS=" in text


def test_variables_are_quoted(tmp_path):
    evil = "a\"b'c $(touch hacked) `touch hacked`; touch hacked\n#SBATCH --nodes=99 é"
    text = rendered(
        tmp_path, environment={"EVIL": evil}, container_image="x; touch hacked", modules=["m; touch hacked"]
    )
    exports = text.partition("# --- job ---")[0]
    (tmp_path / "head.sh").write_text(
        "module() { printf '%s|' \"$@\"; }\n" + exports + '\nprintf "%s" "$EVIL"'
    )
    said = subprocess.run(
        ["bash", "head.sh"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert said == "load|m; touch hacked|" + evil
    assert not (tmp_path / "hacked").exists()
    assert f"EVIL={shlex.quote(evil)}" in text


@pytest.mark.parametrize(
    "options",
    [
        {"partition": 'a"b'},
        {"account": "a b"},
        {"time": "1:00\n#SBATCH --nodes=9"},
        {"constraint": "$(touch hacked)"},
        {"sbatch": {"nodes": "9"}},
        {"sbatch": {"comment": "a;b"}},
        {"sbatch": {"--comment": "x"}},
        {"environment": {"A B": "x"}},
        {"modules": ["--force"]},
    ],
)
def test_what_could_break_out_is_refused(options, tmp_path):
    with pytest.raises(UserError, match=r"cluster\.") as told:
        rendered(tmp_path, **options)
    assert "try:" in str(told.value)


def facts(**changed: object) -> dict[str, object]:
    return {"versions": {"torch": "2.13.0"}, "time": 100.0, "received": 100.2, "problem": "", **changed}


def test_the_health_check_names_the_node():
    names = ["n1", "n2", "n3"]
    assert health.compare({0: facts(), 1: facts(), 2: facts()}, names=names) == {}
    assert health.compare({0: facts(), 2: facts()}, names=names) == {"n2": "it did not report in time"}
    [(node, why)] = health.compare(
        {0: facts(), 1: facts(versions={"torch": "2.11.0"}), 2: facts()}, names=names
    ).items()
    assert (node, "torch 2.11.0 (the first node: 2.13.0)" in why) == ("n2", True)
    assert "clock" in health.compare({0: facts(), 1: facts(), 2: facts(time=40.0)}, names=names)["n3"]
    assert health.compare({0: facts(problem="7 GPUs instead of 8"), 1: facts(), 2: facts()}, names=names) == {
        "n1": "7 GPUs instead of 8"
    }


def free_beside_a_taken_one() -> tuple[int, socket.socket]:
    """A free port, and a socket that listens on the next one."""
    while True:
        taken = socket.socket()
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("", 0))
            taken.bind(("", free.getsockname()[1] + 1))
            taken.listen()
            return free.getsockname()[1], taken
        taken.close()


def test_the_health_check_leaves_the_port_of_the_next_job_alone(tmp_path, monkeypatch, capfd):
    """Jobs of an array have ports side by side."""
    (tmp_path / "run" / "submit").mkdir(parents=True)
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho n1\n")
    (tmp_path / "scontrol").chmod(0o755)
    port, taken = free_beside_a_taken_one()
    place = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "SLURM_NODEID": 0,
        "SLURM_JOB_NUM_NODES": 1,
        "SLURM_JOB_NODELIST": "n1",
    }
    place |= {
        "GLOO_SOCKET_IFNAME": "lo",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "HYBRIDTRAIN_HEALTH_S": 20,
    }
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    with taken:
        assert health.main(tmp_path / "run") == 0
    assert "fit" in capfd.readouterr().out


def report(folder: Path, rank: int, error: str, at: float) -> None:
    folder.mkdir(exist_ok=True)
    told = {
        "time": at,
        "rank": rank,
        "node": f"n{rank}",
        "step": 3,
        "error": error,
        "traceback": f"Traceback: {error}",
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(told))


def test_the_first_failure_is_told_from_its_echoes(tmp_path):
    report(tmp_path, 0, "DistBackendError: [gloo] Connection closed by peer [127.0.0.1]:1234", 1.0)
    report(tmp_path, 2, "ValueError: the reason", 1.5)
    report(tmp_path, 3, "RuntimeError: NCCL communicator was aborted", 0.5)
    found = failure.root_cause(tmp_path, world_size=4)
    assert (found.rank, found.node, found.what) == (2, "n2", "ValueError: the reason")


def test_no_report_no_failure(tmp_path):
    assert failure.root_cause(tmp_path, world_size=4) is None


def test_runs_and_logs_of_this_machine(tmp_path, capfd):
    """Without any scheduler."""
    run = tmp_path / "runs/here"
    finished(2, arguments(run, corpus(tmp_path / "corpus"), train__steps=3))
    assert commands.run_command("runs", [f"runs.folder={tmp_path / 'runs'}"]) == 0
    listed = capfd.readouterr().out.splitlines()
    assert listed[0].split()[:3] == ["run", "status", "step"]
    assert listed[1].split()[:3] == ["here", "finished", "3/3"]
    assert commands.run_command("logs", [str(run), "logs.lines=3"]) == 0
    assert "finished 3 steps" in capfd.readouterr().out
    assert commands.run_command("runs", [f"runs.folder={tmp_path / 'none'}"]) == 2
    assert commands.run_command("logs", [str(tmp_path / "none")]) == 2


def test_a_dry_run_prepares_no_corpus(tmp_path, capfd):
    line = [
        "experiment=quickstart",
        f"data.path={tmp_path / 'shared'}",
        f"run.dir={tmp_path / 'run'}",
        "cluster.ranks_per_node=4",
        "--dry-run",
    ]
    assert commands.run_command("submit", line) == 2
    assert "the corpus is not there yet" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (
            (
                "sbatch: error: fetch_config: DNS SRV lookup failed\n"
                "sbatch: fatal: Could not establish a configuration source"
            ),
            "Slurm cannot be reached from here: ",
        ),
        (
            "sbatch: error: invalid partition specified: x",
            "Slurm refuses the job: invalid partition specified: x",
        ),
    ],
)
def test_a_slurm_that_is_not_there_is_told_from_one_that_refuses(said, answer, tmp_path, monkeypatch):
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\necho {shlex.quote(said)} >&2\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(UserError, match=answer):
        slurm.sbatch(tmp_path / "job.sbatch", test_only=False)
