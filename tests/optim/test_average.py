"""The average of the weights: the formula, the same under every layout, in checkpoints, and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hybridtrain.cli.main import main
from hybridtrain.errors import UserError
from tests.cases import Case, model, start
from tests.engine.test_state import PROGRESS, gathered, merged, step
from tests.ranks import run_ranks
from tests.runs import arguments, corpus, finished

SLOW = pytest.mark.slow
DECAY = 0.7
EMA = (("optim.ema", DECAY),)


def case(layout: str, **options: Any) -> Case:
    return Case(layout, model(tie_word_embeddings=True), steps=4, overrides=EMA, **options)


def averages(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if name.startswith("ema")}


def by_hand() -> dict[str, torch.Tensor]:
    """After four steps of one process, of which the third is skipped."""
    engine = start(case("single"))
    names = [name for name, _ in engine.weights()]
    average = {name: weight.detach().clone() for name, weight in engine.weights()}
    done = 0
    for number in range(4):
        if number == 2:
            broken(engine)
        step(engine, case("single"), number)
        if number == 2:
            mended(engine)
            continue
        done += 1
        decay = min(DECAY, (1 + done) / (10 + done))
        for name, weight in engine.weights():
            average[name] = decay * average[name] + (1 - decay) * weight.detach()
    found = averages(gathered(engine))
    assert found.keys() == {*(f"ema.{name}" for name in names), "ema_updates"}
    assert float(found["ema_updates"]) == 3
    for name in names:
        torch.testing.assert_close(found[f"ema.{name}"], average[name], rtol=1e-5, atol=1e-7)
    return found


def broken(engine: Any) -> None:
    """The next step is not finite."""
    engine.saved = engine.loss_weights
    engine.loss_weights = engine.loss_weights * torch.inf


def mended(engine: Any) -> None:
    engine.loss_weights = engine.saved


def trained(case: Case) -> dict[str, torch.Tensor]:
    engine = start(case)
    for number in range(4):
        if number == 2:
            broken(engine)
        step(engine, case, number)
        if number == 2:
            mended(engine)
    return averages(gathered(engine))


def test_it_is_the_formula() -> None:
    run_ranks(1, by_hand)


@pytest.mark.parametrize(
    "layout", ["dp_shard2-zero3", *(pytest.param(each, marks=SLOW) for each in ("tp2", "pp2", "pp2-tp2"))]
)
def test_a_layout_averages_what_one_process_does(layout: str) -> None:
    (plain,) = run_ranks(1, trained, case("single"))
    ours, _ = merged([(found, []) for found in run_ranks(case(layout).world_size, trained, case(layout))])
    assert ours.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=2e-5)


def saved(case: Case, path: Path) -> dict[str, torch.Tensor]:
    engine = start(case)
    for number in range(2):
        step(engine, case, number)
    engine.save(path, PROGRESS).result()
    return gathered(engine)


def loaded(case: Case, path: Path) -> dict[str, torch.Tensor]:
    engine = start(case)
    step(engine, case, 9)
    engine.load(path)
    return gathered(engine)


@pytest.mark.parametrize(
    ("before", "after"),
    [("dp_shard2-zero3", "tp2"), pytest.param("pp2", "dp_shard2-zero1", marks=SLOW)],
)
def test_another_layout_loads_it(before: str, after: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    theirs, _ = merged([(found, []) for found in run_ranks(2, saved, case(before), path)])
    ours, _ = merged([(found, []) for found in run_ranks(2, loaded, case(after), path)])
    assert averages(ours).keys() == averages(theirs).keys()
    for name, value in averages(theirs).items():
        assert torch.equal(ours[name], value), name


def test_a_run_that_had_none_begins_with_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    without = Case("single", model(tie_word_embeddings=True), steps=4)
    (weights,) = run_ranks(1, saved, without, path)
    (found,) = run_ranks(1, loaded, case("single"), path)
    assert float(found["ema_updates"]) == 0
    for name in averages(found).keys() - {"ema_updates"}:
        assert torch.equal(found[name], weights[name.replace("ema.", "model.")])


@pytest.mark.parametrize("precision", ["bf16_pure", pytest.param("fp64", marks=SLOW)])
def test_it_averages_master_weights(precision: str) -> None:
    """Of bf16_pure with what each weight has beside it: most of these updates are less than bf16 shows."""
    (found,) = run_ranks(1, trained, case("single", precision=precision, lr=1e-5))
    name = "ema.model.layers.0.mlp.up_proj.weight"
    assert found[name].dtype == (torch.float64 if precision == "fp64" else torch.float32)
    assert not torch.equal(found[name], found[name].bfloat16().to(found[name].dtype))


def test_a_run_exports_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = corpus(tmp_path / "corpus")
    for name, options in (("with", {"optim__ema": 0.9}), ("without", {})):
        finished(1, arguments(tmp_path / name, data, train__steps=3, **options))
    run = tmp_path / "with"
    assert main(["export", str(run)]) == 0
    assert main(["export", str(run), "export.weights=ema", f"export.out={tmp_path / 'ema'}"]) == 0
    last, average = (load_file(path / "model.safetensors") for path in (run / "export", tmp_path / "ema"))
    assert last.keys() == average.keys()
    assert not any(torch.equal(last[name], average[name]) for name in last)
    assert '"weights": "ema"' in (tmp_path / "ema" / "hybridtrain.json").read_text()
    capsys.readouterr()
    assert main(["export", str(tmp_path / "without"), "export.weights=ema"]) == 2
    assert "export.weights=ema" in capsys.readouterr().err
    assert main(["export", str(run), "export.weights=mean"]) == 2
    assert "allowed: last, ema" in capsys.readouterr().err


def test_deepspeed_keeps_none() -> None:
    from hybridtrain.config import checks, compose

    words = ["model=tiny", "data.path=x", "train.steps=1", "engine=deepspeed", "optim.ema=0.9"]
    with pytest.raises(UserError, match=r"optim\.ema=0\.9: engine=deepspeed keeps no average"):
        checks.check(compose.compose("train", words))
