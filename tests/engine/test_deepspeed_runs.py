"""Whole runs with engine=deepspeed: the files, losses and exports of the torch engine's; killed, they go on;
they say nothing that ours do not."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hybridtrain.cli import commands
from hybridtrain.engine.deepspeed import state
from hybridtrain.engine.deepspeed.start import quiet
from hybridtrain.training import loop
from tests.cases import Case, deepspeed, on_ranks
from tests.ranks import RankFailed, run_ranks
from tests.runs import Ended, arguments, checkpoints, finished, on_this_rank, rows, summary, torchrun

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero1": (2, {"parallel": "zero1"}),
    "zero3": (2, {"parallel": "zero3"}),
    "tp2": (2, {"parallel": "tp2"}),
    "pp2": (2, {"parallel": "pp2"}),
    "zero3_tp2": (4, {"parallel": "zero3_tp2"}),
    "tp2_pp2": (4, {"parallel": "tp2_pp2"}),
}


@pytest.fixture(scope="module")
def with_torch(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by the torch engine in one process, exported."""
    run = tmp_path_factory.mktemp("torch") / "run"
    finished(1, arguments(run, data, train__eval_every=4))
    assert commands.run_command("export", [str(run)]) == 0
    return run


def logits(run: Path) -> torch.Tensor:
    """Of the export, by plain transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(200, 232).unsqueeze(0)).logits


@pytest.mark.parametrize(
    "name",
    [
        "zero3",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("zero1", "tp2", "pp2", "tp2_pp2", "zero3_tp2")
        ),
    ],
)
def test_a_run_like_any_other(name, data, with_torch, tmp_path):
    run, (processes, options) = tmp_path / "run", LAYOUTS[name]
    ended = finished(
        processes,
        arguments(run, data, engine="deepspeed", train__eval_every=4, checkpoint__every=4, **options),
    )
    assert "deepspeed" in ended.out
    for ours, theirs in zip(rows(run), rows(with_torch), strict=True):
        for key, rel in {
            "loss": 1e-5,
            "grad_norm": 1e-4,
            **({"eval_loss": 1e-5} if "eval_loss" in theirs else {}),
        }.items():
            assert ours[key] == pytest.approx(theirs[key], rel=rel), key
    assert summary(run)["status"] == "finished"
    assert checkpoints(run) == ["step-00000004", "step-00000008"]
    assert json.loads((run / "deepspeed.json").read_text())["zero_optimization"]["stage"] == (
        3 if "zero3" in name else 1
    )
    assert commands.run_command("export", [str(run)]) == 0
    torch.testing.assert_close(logits(run), logits(with_torch), rtol=1e-3, atol=1e-4)


def killed(argv: list[str], step: int) -> Ended:
    """On each rank: the run, until this step begins; then kill -9."""
    rate = loop.lr_at

    def lr_at(number: int, **rest: Any) -> float:
        if number == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return rate(number, **rest)

    loop.lr_at = lr_at
    return on_this_rank(argv)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero3", "tp2_pp2"])
def test_killed_it_goes_on_with_the_same_losses(name, data, tmp_path):
    whole, run, (processes, options) = tmp_path / "whole", tmp_path / "run", LAYOUTS[name]
    settings = {"engine": "deepspeed", "checkpoint__every": 2, **options}
    finished(processes, arguments(whole, data, **settings))
    with pytest.raises(RankFailed):
        run_ranks(processes, killed, arguments(run, data, **settings), 5)
    finished(processes, arguments(run, data, **settings))
    assert rows(run) == rows(whole)


@pytest.mark.slow
def test_it_says_nothing_of_its_own(data, tmp_path):
    """Not under torchrun either, where DeepSpeed logs, warns and prints on every rank."""
    process = torchrun(
        2, arguments(tmp_path / "run", data, engine="deepspeed", parallel="zero3", train__steps=2)
    )
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    beginnings = ("model", "layout", "batch", "precision", "backend", "run", "step", "finished")
    assert all(line.startswith(beginnings) for line in out.splitlines()), out
    noise = [
        line
        for line in err.splitlines()
        if line.strip()
        and "OMP_NUM_THREADS" not in line
        and set(line) != {"*"}
        and "torch/distributed/run.py" not in line
    ]
    assert noise == []


def test_what_it_said_is_shown_when_it_fails(capfd):
    def fails() -> None:
        with quiet():
            print("the reason, in DeepSpeed's words")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert "the reason, in DeepSpeed's words" in capfd.readouterr().err


def most_whole_at_once(case: Case) -> tuple[int, int]:
    """(elements of whole parameters that existed together while the stage was made, elements of all)."""
    seen = [0]

    class Watched(state._LazyParameters):
        def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
            for parameter in super().parameters(recurse):
                seen.append(sum(made.numel() for made in self.allocated.values()))
                yield parameter

    from tests.cases import start

    state._LazyParameters = Watched  # type: ignore[misc]
    engine = start(case)
    return max(seen), sum(int(torch.Size(part.shape).numel()) for part in engine.parts.values())


def test_zero_3_never_holds_a_whole_model():
    case = deepspeed(
        "dp_shard2-zero3",
        overrides=(
            ("engine.config_overrides", {"zero_optimization": {"stage3_param_persistence_threshold": 0}}),
        ),
    )
    for most, whole in run_ranks(2, most_whole_at_once, case):
        assert 0 < most < whole / 4


def test_offload_uses_no_compiled_op(tmp_path, monkeypatch):
    """CPU runs compile nothing: the folder of compiled extensions stays as it was."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    on_ranks(deepspeed("dp_shard2-zero1", overrides=(("engine.offload_optimizer", "cpu"),)))
    assert not list((tmp_path / "extensions").rglob("*.so"))
