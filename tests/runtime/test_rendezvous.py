"""Ranks meet, agree on what they do, and say who is missing or differs; launcher variables that make
no sense are refused."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from hybridtrain.cli.commands import run_command
from hybridtrain.config.compose import compose
from hybridtrain.runtime import launch, network
from hybridtrain.runtime import store as store_
from hybridtrain.training import agreement
from tests.ranks import run_ranks
from tests.runs import Ended, arguments, four_parts, on_this_rank

ROOT = Path(__file__).resolve().parents[2]
FOUR = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(argv: list[str], *, package: Path, **variables: object) -> subprocess.Popen[str]:
    """A training process with these variables, as somebody's own launcher would start it."""
    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("SLURM_", "TORCHELASTIC_")) and key not in (*FOUR, "LOCAL_RANK")
    }
    given = {key: str(value) for key, value in variables.items()}
    environment = {
        **clean,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(package),
        **given,
    }
    command = [sys.executable, "-m", "hybridtrain.train", *argv]
    return subprocess.Popen(
        command, env=environment, cwd=package, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ends(processes: list[subprocess.Popen[str]], *, within_s: float) -> list[Ended]:
    until = time.monotonic() + within_s
    try:
        outputs = [process.communicate(timeout=max(0.1, until - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    return [
        Ended(process.returncode, out, err) for process, (out, err) in zip(processes, outputs, strict=True)
    ]


# -- launcher variables --------------------------------------------------------------------------------------

GOOD = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "LOCAL_RANK": "0"}
WRONG: list[tuple[dict[str, str | None], list[str]]] = [
    ({"RANK": "abc"}, ["RANK=abc", "is no whole number"]),
    ({"RANK": ""}, ["RANK=''", "is no whole number"]),
    ({"RANK": "-1"}, ["RANK=-1"]),
    ({"RANK": "2"}, ["RANK=2", "not below WORLD_SIZE=2"]),
    ({"RANK": "²"}, ["is no whole number"]),
    ({"WORLD_SIZE": "0"}, ["WORLD_SIZE=0"]),
    ({"WORLD_SIZE": "-1"}, ["WORLD_SIZE=-1"]),
    ({"WORLD_SIZE": ""}, ["WORLD_SIZE=''"]),
    ({"WORLD_SIZE": "abc"}, ["WORLD_SIZE=abc"]),
    ({"MASTER_PORT": "abc"}, ["MASTER_PORT=abc"]),
    ({"MASTER_PORT": "0"}, ["MASTER_PORT=0"]),
    ({"MASTER_PORT": "65536"}, ["MASTER_PORT=65536"]),
    ({"MASTER_ADDR": " "}, ["MASTER_ADDR= ", "is empty"]),
    ({"LOCAL_RANK": "x"}, ["LOCAL_RANK=x"]),
    ({"RANK": None}, ["missing is RANK"]),
    ({"MASTER_ADDR": None, "MASTER_PORT": None}, ["missing are MASTER_ADDR, MASTER_PORT"]),
    (
        {"RANK": None, "MASTER_ADDR": None, "MASTER_PORT": None, "LOCAL_RANK": None},
        ["WORLD_SIZE=2: set are WORLD_SIZE=2", "missing are RANK"],
    ),
    ({"WORLD_SIZE": None, "MASTER_ADDR": None, "MASTER_PORT": None}, ["RANK=0", "missing are WORLD_SIZE"]),
    ({"GLOO_SOCKET_IFNAME": "nosuch0"}, ["GLOO_SOCKET_IFNAME=nosuch0", "no network interface nosuch0", "lo"]),
    ({"HYBRIDTRAIN_DEADLINE": "abc"}, ["HYBRIDTRAIN_DEADLINE=abc", "not a time"]),
    ({"HYBRIDTRAIN_DEADLINE": "1000"}, ["HYBRIDTRAIN_DEADLINE=1000", "ago", "unset HYBRIDTRAIN_DEADLINE"]),
    (
        {
            "RANK": None,
            "WORLD_SIZE": None,
            "SLURM_PROCID": "1",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_JOB_ID": "7",
        },
        ["SLURM_LOCALID=", "not set"],
    ),
]


@pytest.mark.parametrize(("change", "words"), WRONG)
def test_launcher_variables_that_make_no_sense_are_refused_together(change, words, monkeypatch, capsys):
    for name in (*GOOD, "SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**GOOD, **change}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr("hybridtrain.runtime.launch.RANK_0_FIRST_S", 0.0)
    assert run_command("train", ["model=tiny", "data.path=x", "train.steps=1"]) == 2
    text = capsys.readouterr().err
    assert [word for word in words if word not in text] == [], text
    four_parts(text, words[0].partition("=")[0] if "=" in words[0] else "")


def test_variables_that_a_job_script_exports_are_no_launcher(monkeypatch):
    for name in GOOD:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    launch.check()
    assert not launch.is_launched()


def test_a_scontrol_that_fails_is_a_refusal(monkeypatch, tmp_path, capsys):
    fake = tmp_path / "scontrol"
    fake.write_text("#!/bin/sh\necho 'slurm_load: Unable to contact slurm controller' >&2\nexit 1\n")
    fake.chmod(0o755)
    for name, value in {
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_JOB_ID": "7",
        "PATH": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    for name in (*GOOD,):
        monkeypatch.delenv(name, raising=False)
    assert run_command("train", []) == 2
    assert "Unable to contact slurm controller" in four_parts(capsys.readouterr().err, "MASTER_ADDR")


@pytest.mark.parametrize("command", ["train", "runs", "report", "prepare", "submit", "export"])
def test_a_working_directory_that_was_removed_is_a_refusal(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    try:
        assert run_command(command, []) == 2
    finally:
        os.chdir(tmp_path)
    four_parts(capsys.readouterr().err, "working directory")


# -- rendezvous ----------------------------------------------------------------------------------------------


@pytest.fixture
def argv(data: Path, tmp_path: Path) -> list[str]:
    return arguments(tmp_path / "run", data, train__steps=2)


def test_rank_0_says_for_whom_it_waits_and_names_it_at_the_end(argv, tmp_path):
    port = free_port()
    process = start(
        [*argv, "engine.timeout_s=7"],
        package=ROOT,
        RANK=0,
        WORLD_SIZE=4,
        LOCAL_RANK=0,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
    )
    [ended] = ends([process], within_s=120)
    assert ended.code == 2
    assert re.search(rf"waits for ranks 1, 2, 3 of 4 at 127\.0\.0\.1:{port}, at most [1-6] s more", ended.out)
    assert "ranks 1, 2, 3 of 4 did not come within 7 s" in four_parts(ended.err, "engine.timeout_s")
    assert not (tmp_path / "run").exists(), "a start that does not come about leaves no trace"


@pytest.mark.parametrize("local_rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_without_a_rank_0_says_so(argv, local_rank):
    """Of several ranks of a machine the first one says for whom they wait; at the end of the time each that
    is still there says what it waited for."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    process = start(
        [*argv, "engine.timeout_s=7"], package=ROOT, RANK=1, WORLD_SIZE=2, LOCAL_RANK=local_rank, **where
    )
    [ended] = ends([process], within_s=120)
    assert ended.code == 2
    assert ("waits for rank 0 (connection refused)" in ended.err) == (local_rank == 0)
    assert "rank 0 (connection refused) did not come within 7 s" in ended.err
    assert "Traceback" not in ended.err


def test_a_port_that_is_taken_is_a_refusal(argv, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start(
            argv, package=ROOT, RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
        [ended] = ends([process], within_s=120)
    assert ended.code == 2
    assert "another process listens on it" in four_parts(ended.err, "MASTER_PORT")
    assert not (tmp_path / "run").exists()


def test_an_entry_that_is_deleted_while_it_is_read_is_none() -> None:
    """As rank 0's, once all ranks have joined."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    keys = Deleting("start", store)
    keys.set("rank/0", "{}")
    began = time.monotonic()
    assert store_.read(keys, "rank/0", timeout_s=60) == {}
    assert time.monotonic() - began < 30
    keys.set("rank/0", '{"job": "job A"}')
    assert dist.PrefixStore("start", store).get("rank/0") == b'{"job": "job A"}'


class Deleting(dist.PrefixStore):
    """Says that a key is there, and deletes it."""

    def check(self, keys: list[str]) -> bool:
        there = super().check(keys)
        for key in keys:
            self.delete_key(key)
        return there


def two_jobs(folder: Path, data: Path) -> tuple[list[str], list[str], dict[str, Any]]:
    """Two command lines, and what the environment of ranks of both has: one port, two ranks."""
    common: dict[str, Any] = {
        "package": ROOT,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    first = arguments(folder / "a", data, train__steps=3)
    return first, arguments(folder / "b", data, train__steps=3, optim__lr=0.1), common


@pytest.mark.slow
def test_two_jobs_on_one_port_stay_apart_and_the_foreign_ranks_are_named(data, tmp_path):
    first, second, common = two_jobs(tmp_path, data)
    strangers = [start(second, **common, RANK=1, LOCAL_RANK=1, HYBRIDTRAIN_JOB="job B")]
    ours = [start(first, **common, RANK=rank, LOCAL_RANK=rank, HYBRIDTRAIN_JOB="job A") for rank in range(2)]
    a0, a1, b1 = ends([*ours, *strangers], within_s=200)
    assert (a0.code, a1.code, b1.code) == (0, 0, 2), (a0, a1, b1)
    assert "job A meets there" in b1.err
    assert "rank 1" in b1.err
    assert "is of job B" in b1.err


@pytest.mark.slow
def test_two_starts_without_a_name_on_one_port_never_mix(data, tmp_path):
    """Whoever comes second is refused, or both: none trains with a rank of the other."""
    a, b, common = two_jobs(tmp_path, data)
    processes = [start(argv, **common, RANK=rank, LOCAL_RANK=rank) for argv in (a, b) for rank in (1, 0)]
    ended = ends(processes, within_s=200)
    finished = [[process.code == 0 for process in ended[at : at + 2]] for at in (0, 2)]
    assert all(len(set(pair)) == 1 for pair in finished), ended
    assert sum(pair[0] for pair in finished) <= 1
    assert all("Traceback" not in process.err for process in ended)


# -- agreement -----------------------------------------------------------------------------------------------

DIFFERENT = {
    "optim.lr": "0.1",
    "run.seed": "7",
    "schedule.kind": "linear",
    "data.seq_len": "16",
    "precision.kind": "bf16_mixed",
    "train.steps": "9",
    "optim.weight_decay": "0.5",
}


def differing(argv: list[str], changes: dict[str, str]) -> list[Ended]:
    """On each rank: the run once for each change, which rank 1 alone makes."""
    ended = []
    for key, value in changes.items():
        ended.append(on_this_rank([*argv, f"{key}={value}"] if os.environ["RANK"] == "1" else argv))
    return ended


def test_ranks_with_different_options_are_refused_by_name(argv, tmp_path):
    first, second = run_ranks(2, differing, argv, DIFFERENT)
    for (key, value), ours, theirs in zip(DIFFERENT.items(), first, second, strict=True):
        text = four_parts(ours.err, key)
        assert "rank 1 on" in text
        assert f"and {value} there" in text
        assert (ours.code, theirs.code, theirs.err, theirs.out) == (2, 2, "", "")
    assert not (tmp_path / "run").exists()


def with_environment(argv: list[str], options: list[str]) -> list[Ended]:
    """On each rank: the run with each option, in an environment of its own."""
    os.environ["MINE"] = os.environ["RANK"]
    os.environ["CORPUS"] = argv[0] if os.environ["RANK"] == "0" else argv[0] + "/."
    return [on_this_rank([*argv[1:], option]) for option in options]


def test_references_to_the_environment_may_name_other_places_on_each_host_and_nothing_else(argv, data):
    first, _ = run_ranks(
        2,
        with_environment,
        [str(data), *argv],
        ["data.path=${oc.env:CORPUS}", "tracker.project=${oc.env:MINE}"],
    )
    assert first[0].code == 0, first[0].err
    assert first[1].code == 2
    assert "tracker.project=${oc.env:MINE} here and ${oc.env:MINE}, whose value differs there" in four_parts(
        first[1].err, "tracker.project"
    )


@pytest.mark.slow
def test_ranks_with_different_code_are_refused_by_file(argv, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(ROOT / "hybridtrain", other / "hybridtrain")
    shutil.copytree(ROOT / "conf", other / "conf")
    with (other / "hybridtrain" / "optim" / "optimizer.py").open("a") as file:
        file.write("\n# another version\n")
    common = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ended = ends(
        [
            start(argv, package=package, **common, RANK=rank, LOCAL_RANK=rank)
            for rank, package in enumerate((ROOT, other))
        ],
        within_s=200,
    )
    assert [process.code for process in ended] == [2, 2]
    assert "rank 1 on" in four_parts(ended[0].err, "hybridtrain/optim/optimizer.py")
    assert ended[1].err == ""


def test_secrets_are_not_in_what_ranks_compare(monkeypatch):
    monkeypatch.setenv("SECRET", "s3cr3t")
    config = compose(
        "train",
        [
            "data.path=x",
            "model=tiny",
            "train.steps=1",
            "tracker.project=${oc.env:SECRET}",
            "data.eval_path=${oc.env:SECRET}",
        ],
    )
    told = agreement.options(config)
    assert "s3cr3t" not in str(told)
    assert told["data.eval_path"] == ["${oc.env:SECRET}", ""]
    assert told["tracker.project"][1]


# -- the network ---------------------------------------------------------------------------------------------


def test_the_card_on_the_route_is_found(monkeypatch):
    import psutil

    assert network.interface_to("127.0.0.1") == "lo"
    assert network.interface_to("no.such.name.invalid") == ""
    own = [
        (card, entry.address)
        for card, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET
    ]
    assert [network.interface_to(address) for _, address in own] == [card for card, _ in own], (
        "also of this host's own addresses"
    )
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "chosen")
    network.choose_interface("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "chosen"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    network.choose_interface("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
