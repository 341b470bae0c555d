"""What goes wrong while a run is under way: a full disk, a loss that is no number, changed token files, a
tracker that is not there."""

from __future__ import annotations

import json
import re
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from hybridtrain.config.compose import read_run
from hybridtrain.export.hf import SourceRun, export
from tests.ranks import run_ranks
from tests.runs import (
    Ended,
    arguments,
    checkpoints,
    finished,
    four_parts,
    on_ranks,
    on_this_rank,
    rows,
    summary,
    torchrun,
)

LARGEST_FILE = 400_000
"""Bytes. Between the few KB of the other files and the 1.3 MB that each of two ranks writes of a
checkpoint of the tiny model."""


def on_a_full_disk(argv: list[str]) -> Ended:
    """On each rank: files larger than LARGEST_FILE fail with EFBIG, as writes to a full
    disk do with ENOSPC."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    return on_this_rank(argv)


@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_full_disk_ends_the_run_on_every_rank_and_the_same_command_goes_on(
    data: Path, tmp_path: Path, asynchronous: bool
) -> None:
    straight, run = tmp_path / "straight", tmp_path / "run"
    options = {"checkpoint__every": 2, "checkpoint__keep_last": 0, "checkpoint__asynchronous": asynchronous}
    finished(2, arguments(straight, data, **options))
    finished(2, arguments(run, data, train__steps=2, **options))
    argv = arguments(run, data, **options)
    ended = run_ranks(2, on_a_full_disk, argv)
    assert [rank.code for rank in ended] == [2, 2]
    text = four_parts(ended[0].err, "checkpoint")
    assert "step-00000004: rank " in text
    assert "File too large" in text
    assert checkpoints(run) == ["step-00000002"]
    assert summary(run)["status"] == "failed"
    assert "could not write it" in str(summary(run)["exit_reason"])
    said = finished(2, argv).out
    assert "resumed   step-00000002" in said
    assert rows(run) == rows(straight)
    assert checkpoints(run) == checkpoints(straight)


@pytest.mark.slow
def test_a_full_disk_under_torchrun_is_said_once(data: Path, tmp_path: Path) -> None:
    argv = arguments(tmp_path / "run", data, train__steps=6, checkpoint__every=2)
    process = torchrun(2, argv)
    # its children inherit it
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    _, err = process.communicate(timeout=180)
    assert process.returncode != 0
    said = [line for line in err.splitlines() if "could not write it" in line]
    assert sum(line.startswith("hybridtrain train: checkpoint=") for line in said) == 1, err
    assert all("traceback : hybridtrain train: checkpoint=" in line for line in said[1:]), (
        "torchrun's summary repeats it" + err
    )
    assert "File too large" in err
    assert checkpoints(tmp_path / "run") == []
    assert summary(tmp_path / "run")["status"] == "failed"


def on_a_disk_full_of_metrics(argv: list[str]) -> Ended:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
    return on_this_rank(argv)


def test_a_disk_without_space_for_a_line_is_said_too(data: Path, tmp_path: Path) -> None:
    ended = run_ranks(
        1,
        on_a_disk_full_of_metrics,
        arguments(tmp_path / "run", data, train__steps=50, model__name="x" * 400),
    )
    assert ended[0].code == 2
    text = four_parts(ended[0].err, "run.dir")
    assert "cannot be written" in text


BLOWN_UP = {"optim__lr": 1e4, "optim__weight_decay": 1e4}  # each update multiplies every weight by -1e8


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"parallel__pp": 2, "precision": "bf16_mixed"}, marks=pytest.mark.slow)]
)
def test_steps_that_stay_non_finite_end_the_run(
    data: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    """After a few updates every gradient is infinite or no number."""
    argv = arguments(
        tmp_path / "run",
        data,
        train__steps=50,
        train__max_nonfinite=3,
        train__log_every=5,
        checkpoint__every=1,
        **BLOWN_UP,
        **options,
    )
    ended = on_ranks(2, argv)
    assert ended.code == 2
    text = four_parts(ended.err, "train.max_nonfinite")
    assert re.search("the gradients of [345] steps in a row", text), text
    assert "lower optim.lr" in text
    written = rows(tmp_path / "run")
    assert written[0]["loss"] is not None
    assert summary(tmp_path / "run")["status"] == "failed"
    assert "train.max_nonfinite=3" in str(summary(tmp_path / "run")["exit_reason"])


def test_weights_that_are_no_numbers_end_the_run(data: Path, tmp_path: Path) -> None:
    finished(1, arguments(tmp_path / "first", data, train__steps=1))
    newest = tmp_path / "first" / "checkpoints" / "step-00000001"
    run = SourceRun(tmp_path / "first", read_run(tmp_path / "first" / "config.yaml"))
    export(
        newest,
        run=run,
        out=tmp_path / "model",
        dtype="float32",
        which="last",
        merge=False,
        max_shard_bytes=10**9,
    )
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.3.mlp.up_proj.weight"][5, 7] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    argv = [
        text
        for text in arguments(
            tmp_path / "run", data, model__from_pretrained=tmp_path / "model", train__max_nonfinite=2
        )
        if not text.startswith("model=")
    ]
    ended = on_ranks(2, argv)
    assert ended.code == 2
    assert "2 steps in a row" in four_parts(ended.err, "train.max_nonfinite")
    assert [(row["loss"], row["skipped"]) for row in rows(tmp_path / "run")] == [(None, 1), (None, 1)]


def test_token_files_that_changed_after_prepare_are_refused_where_they_are_read(
    data: Path, tmp_path: Path
) -> None:
    spoilt = Path(shutil.copytree(data, tmp_path / "data"))
    facts = {
        name: value
        for name, value in json.loads((spoilt / "corpus.json").read_text()).items()
        if name != "digests"
    }
    # as an earlier version left it: nothing to compare the files with
    (spoilt / "corpus.json").write_text(json.dumps(facts))
    tokens = np.fromfile(spoilt / "train.bin", dtype="<u2")
    tokens[::50] = 60000
    tokens.tofile(spoilt / "train.bin")
    ended = on_ranks(2, arguments(tmp_path / "run", spoilt))
    assert ended.code == 2
    assert "token id 60000 was read from it" in four_parts(ended.err, "data.path")


@pytest.mark.slow  # wandb takes its time; tests/run/test_trackers.py has the short version
def test_a_tracker_that_cannot_be_reached_does_not_stop_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "WANDB_MODE": "online",
        "WANDB_API_KEY": "0" * 40,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
    }.items():
        monkeypatch.setenv(name, value)
    ended = finished(2, arguments(tmp_path / "run", data, tracker__kinds="[wandb]", train__steps=3))
    assert (ended.out + ended.err).count("tracker wandb gave up") == 1
    assert len(rows(tmp_path / "run")) == 3
    assert summary(tmp_path / "run")["status"] == "finished"
