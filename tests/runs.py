"""Whole training runs as a user starts them: on forked ranks (fast), or under torchrun; and
what they leave behind."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import io
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hybridtrain.checkpoint import marker, metadata
from hybridtrain.cli import commands
from hybridtrain.config import schema
from hybridtrain.data.prepare.tokenize import prepare
from hybridtrain.runtime import launch
from tests.ranks import run_ranks

SAME = ("step", "tokens_seen", "loss", "grad_norm", "lr", "loss_scale", "skipped", "eval_loss")
"""What a step's line must repeat bit for bit; the others are times and memory."""


def corpus(folder: Path, *, words: str = "follows", documents: int = 12) -> Path:
    """A small prepared corpus: some 20,000 tokens of a vocabulary of 300, with held-out documents."""
    text = folder / "text"
    text.mkdir(parents=True)
    for number in range(documents):
        (text / f"{number}.txt").write_text(
            " ".join(f"number {number * n} {words} {n * n},\n" for n in range(120))
        )
    return prepare(
        schema.DataConfig(path=str(folder / "data"), source=[str(text)], vocab_size=300, eval_fraction=0.2),
        options=schema.PrepareConfig(),
    )


def arguments(run: Path, data: Path, **options: object) -> list[str]:
    """A command line of `hybridtrain train`; options are written section__field=value."""
    given = {
        "model": "tiny",
        "model__config__vocab_size": 300,
        "run__dir": run,
        "data__path": data,
        "data__seq_len": 32,
        "batch__global_batch_size": 8,
        "batch__micro_batch_size": 1,
        "train__steps": 8,
        "train__log_every": 1,
        "schedule": "constant",
        "optim__lr": 0.003,
        **options,
    }
    return [f"{key.replace('__', '.')}={value}" for key, value in given.items()]


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended, and what it said."""

    code: int
    out: str
    err: str


def on_this_rank(argv: list[str]) -> Ended:
    """`hybridtrain train` in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        # there is no launcher that would end the other ranks
        launch.RANK_0_FIRST_S = launch.AFTER_RANK_0_S = 0.2
        code = commands.run_command("train", argv)
    return Ended(code, out.getvalue(), err.getvalue())


def on_ranks(world_size: int, argv: list[str], *, timeout_s: float = 600.0) -> Ended:
    """The run on forked ranks; all must end alike, and rank 0's words are returned.

    After `timeout_s` every rank is killed (RankFailed).
    """
    ended = run_ranks(world_size, on_this_rank, argv, timeout_s=timeout_s)
    assert len({rank.code for rank in ended}) == 1, ended
    return ended[0]


def finished(world_size: int, argv: list[str]) -> Ended:
    """The run on forked ranks, which must reach its end."""
    ended = on_ranks(world_size, argv)
    assert ended.code == 0, ended.err
    return ended


def torchrun(world_size: int, argv: list[str]) -> subprocess.Popen[str]:
    """Start the run under torchrun, as a user would."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(world_size),
    ]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launcher, "-m", "hybridtrain.train", *argv],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def rows(run: Path) -> list[dict[str, object]]:
    """The lines of metrics.jsonl, each step once and in order, without what differs between any two runs."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)), f"steps {steps}"
    return [
        {key: value for key, value in line.items() if key in SAME or key.startswith("train_")}
        for line in lines
    ]


def summary(run: Path) -> dict[str, object]:
    return json.loads((run / "summary.json").read_text())


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Everything a checkpoint holds, whole."""
    stored = metadata.read(checkpoint)
    result = {
        key: torch.zeros(entry.size, dtype=entry.properties.dtype)
        for key, entry in stored.state_dict_metadata.items()
    }
    metadata.load_into(result, path=checkpoint, metadata=stored, group=None)
    return result


def assert_equal_state(ours: Path, theirs: Path) -> None:
    """The same tensors bit for bit, and the same progress."""
    ours_state, theirs_state = tensors(ours), tensors(theirs)
    assert ours_state.keys() == theirs_state.keys()
    differing = [key for key, value in theirs_state.items() if not torch.equal(ours_state[key], value)]
    assert not differing
    assert marker.read_progress(ours) == marker.read_progress(theirs)


@contextlib.contextmanager
def immutable(path: Path) -> Iterator[None]:
    """A file or folder that cannot be removed or renamed, by anybody (as after chattr +i); skips the test
    where the file system has no such thing."""
    get, put, flag = 0x80086601, 0x40086602, 0x10  # FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_IMMUTABLE_FL
    handle = os.open(path, os.O_RDONLY)  # by its handle: its folder may be renamed meanwhile
    try:
        (flags,) = struct.unpack("l", fcntl.ioctl(handle, get, struct.pack("l", 0)))
        fcntl.ioctl(handle, put, struct.pack("l", flags | flag))
    except OSError:
        os.close(handle)
        pytest.skip("files cannot be made immutable here")
    try:
        yield
    finally:
        fcntl.ioctl(handle, put, struct.pack("l", flags))
        os.close(handle)


def four_parts(text: str, field: str) -> str:
    """Check that a refusal names `field` with its value, what is allowed and what to try, once and without a
    traceback; return it."""
    assert text.count("allowed: ") == 1, text
    assert text.count("try:     ") == 1, text
    assert f"{field}=" in text, text
    assert "Traceback" not in text, text
    return text


def cut_off(whole: Path, run: Path, *, step: int) -> Path:
    """A copy of the run as a crash after checkpoint `step` would leave it: later lines are there, later
    checkpoints are not; nor is what planted.py notes beside it.
    """
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("read-*"))
    for path in (run / "checkpoints").iterdir():
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)
    return run
