"""Runs, corpora and an export that version 0.1 made are read for ever: resumed, exported,
evaluated, reported, listed.

tests/fixtures/v0_1 has them, with how they were made (make.sh) and what that version made of
them next (expected.json).
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hybridtrain.cli.main import main
from hybridtrain.config.compose import read_run
from tests.ranks import run_ranks
from tests.runs import Ended, on_this_rank, rows

FIXTURE = Path(__file__).parent / "fixtures" / "v0_1"
EXPECTED: dict[str, list[dict[str, Any]]] = json.loads((FIXTURE / "expected.json").read_text())
RANKS = {"dp2": 2, "tp2_pp2": 4, "tied_zero3": 2, "fp16": 2, "ds_zero1": 2, "ds_zero3": 2}
SAVED = 4  # steps that each run had done; `again` asks for two more

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the package deepspeed is not installed"
)
EACH = [pytest.param(name, marks=[needs_deepspeed] if name.startswith("ds_") else []) for name in RANKS]


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the old version worked in, and the working directory of this test."""
    with tarfile.open(FIXTURE / "v0_1.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _resumed(folder: Path, argv: list[str]) -> Ended:
    os.chdir(folder)  # paths in an old config.yaml are relative
    return on_this_rank(argv)


def _expected_eval(name: str) -> float:
    return next(row["eval_loss"] for row in EXPECTED[name] if row["step"] == SAVED)


@pytest.mark.parametrize("name", EACH)
def test_an_old_run_is_resumed_with_the_losses_it_would_have_had(old: Path, name: str) -> None:
    shutil.copytree(old / "runs" / name, old / "more" / name)
    ended = run_ranks(RANKS[name], _resumed, old, ["--config-dir", "again", f"experiment={name}"])
    assert {rank.code for rank in ended} == {0}, ended[0].err + ended[0].out
    # hysteresis is younger than these runs: they go on with one step, as they trained
    assert read_run(old / "more" / name / "config.yaml").precision.hysteresis == 1
    events = (old / "more" / name / "events.jsonl").read_text()
    assert "hysteresis" not in events.splitlines()[-2]
    ours = rows(old / "more" / name)
    assert [row["step"] for row in ours] == [1, 2, 3, 4, 5, 6]
    for row, theirs in zip(ours, EXPECTED[name], strict=True):
        for key, value in theirs.items():
            if key == "loss_scale" and name == "fp16" and row["step"] > SAVED:
                value = 2 * value  # the old version's multiplied two data ranks times the loss
            assert row[key] == pytest.approx(value, rel=1e-6), (row["step"], key)


@pytest.mark.parametrize("name", EACH)
def test_an_old_run_is_exported_and_its_export_evaluated(
    old: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = old / "out"
    assert main(["export", f"runs/{name}", f"export.out={out}"]) == 0
    if name == "dp2":  # the old version's own export of the same run
        ours, theirs = (
            load_file(out / "model.safetensors"),
            load_file(old / "runs" / name / "export" / "model.safetensors"),
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    data = {"tied_zero3": "megatron/mega_eval", "ds_zero3": "sft"}.get(name, "corpus")
    capsys.readouterr()
    # token files by prefix have no tokenizer; what is evaluated is named by its own option
    options = (
        [f"data.eval_path={data}", "data.path=megatron/mega_train"]
        if name == "tied_zero3"
        else [f"data.path={data}"]
    )
    assert main(["evaluate", f"evaluate.source={out}", "data.seq_len=32", "train.eval_rows=4", *options]) == 0
    loss = next(
        float(line.split()[1]) for line in capsys.readouterr().out.splitlines() if line.startswith("loss")
    )
    tolerance = 1e-4 if name == "fp16" else 1e-5  # that run computes in fp16, an evaluation in fp32
    assert loss == pytest.approx(_expected_eval(name), rel=tolerance)


def test_old_runs_are_reported_and_listed(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in RANKS:
        assert main(["report", f"runs/{name}"]) == 0
        page = (old / "runs" / name / "report" / "index.html").read_text()
        assert f"{EXPECTED[name][SAVED - 1]['loss']:.4f}"[:5] in page
    assert main(["report", "--compare", "runs/dp2", "runs/fp16"]) == 0
    capsys.readouterr()
    assert main(["runs"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in [*RANKS, "queued"])
    assert out.count("finished") == len(RANKS)


def test_an_old_corpus_is_prepared_already(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in (old / "corpus").iterdir() if path.is_file()}
    assert (
        main(
            [
                "prepare",
                "data=text",
                "data.source=[texts]",
                "data.path=corpus",
                "data.vocab_size=270",
                "data.eval_fraction=0.3",
            ]
        )
        == 0
    )
    said = capsys.readouterr()
    assert "prepared already" in said.out + said.err
    assert {path.name: path.read_bytes() for path in (old / "corpus").iterdir() if path.is_file()} == before


def test_a_run_that_an_old_version_queued_can_start(old: Path) -> None:
    queued = old / "runs" / "queued"
    argv = ["--config-dir", str(queued / "submit" / "conf"), "experiment=submitted", f"run.dir={queued}"]
    ended = run_ranks(2, _resumed, old, argv)
    assert {rank.code for rank in ended} == {0}, ended[0].err + ended[0].out
    # New weights are drawn in another way than by that version.
    assert [row["loss"] for row in rows(queued)] == pytest.approx(
        [row["loss"] for row in EXPECTED["dp2"][:SAVED]], rel=0.02
    )
    assert math.isfinite(json.loads((queued / "summary.json").read_text())["final_loss"])


@pytest.mark.parametrize("name", EACH)
def test_old_runs_are_verified(old: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(old / "runs" / name)]) == 0, capfd.readouterr().err
