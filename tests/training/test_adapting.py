"""Adaptive precision in whole runs: it promotes the layers in which outliers were planted and no others, at
the same steps under every layout, and after a resumption.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hybridtrain.checkpoint import marker
from tests import cases
from tests.cases import Case
from tests.cli.lines import refused
from tests.ranks import run_ranks
from tests.runs import arguments, corpus, finished
from tests.training.planted import run as planted_run
from tests.training.test_recovery import BACK, bad_row

FACTOR = 1e8
UPS = ("gate", "up", "down")
PLANTED = {
    "model.layers.1.mlp.up_proj",
    "model.layers.1.mlp.down_proj",
    *(f"model.layers.2.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")),
}
FP8 = {
    "precision__compute": "fp8_tensorwise",
    "precision__adaptive": "true",
    "precision__ladder": "[fp8_tensorwise,bf16]",
    "precision__monitor_every": 2,
}
FP16 = {
    **FP8,
    "precision__compute": "fp16",
    "precision__ladder": "[fp16,bf16]",
    "precision__static_scale": 1024,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a channel that is multiplied where it is made, and divided where it is used."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5] *= FACTOR
        model.model.layers[1].mlp.down_proj.weight[:, 5] /= FACTOR
        layer = model.model.layers[2]
        layer.input_layernorm.weight[7] *= FACTOR
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).weight[:, 7] /= FACTOR
    folder = tmp_path_factory.mktemp("planted")
    model.save_pretrained(folder)
    return folder


def options(planted: Path, **given: object) -> dict[str, object]:
    """Of a run; the planted weights are frozen, since Adam would undo the plant."""
    frozen = [*(f"{name}.weight" for name in sorted(PLANTED)), "model.layers.2.input_layernorm.weight"]
    return {
        "model__from_pretrained": planted,
        "model__freeze": f"[{','.join(frozen)}]",
        "train__steps": 6,
        "train__max_nonfinite": 100,
        "optim__lr": 1e-4,
        **given,
    }


def train(run: Path, data: Path, world: int, **given: object) -> list[tuple[int, str, str]]:
    """(step, layer, its new format) of the decisions of a run."""
    words = [word for word in arguments(run, data, **given) if not word.startswith("model=")]
    words = [word for word in words if not word.startswith("model.config")]
    finished(world, words)
    found = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    made = [(event["step"], event["detail"]) for event in found if event["kind"] == "precision"]
    return [
        (step, text.partition(":")[0], text.partition(" -> ")[2].partition(",")[0]) for step, text in made
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, data: Path, planted: Path) -> list[tuple[int, str, str]]:
    return train(tmp_path_factory.mktemp("alone"), data, 1, **options(planted, **FP8))


def test_the_planted_layers_are_promoted_and_no_others(alone: list[tuple[int, str, str]]) -> None:
    assert {layer for _, layer, _ in alone} == PLANTED
    assert {name for _, _, name in alone} == {"bf16"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "axes"),
    [
        (2, {"parallel__tp": 2}),
        (2, {"parallel__pp": 2}),
        (2, {"parallel__dp_shard": 2, "parallel__zero_stage": 3, "batch__micro_batch_size": 1}),
        (4, {"parallel__pp": 2, "parallel__tp": 2}),
    ],
    ids=["tp2", "pp2", "zero3", "pp2-tp2"],
)
def test_every_layout_decides_alike(
    alone: list[tuple[int, str, str]],
    data: Path,
    planted: Path,
    tmp_path: Path,
    world: int,
    axes: dict[str, int],
) -> None:
    assert train(tmp_path / "run", data, world, **options(planted, **FP8, **axes)) == alone


@pytest.mark.slow
def test_a_resumed_run_decides_as_one_that_was_not_interrupted(
    alone: list[tuple[int, str, str]], data: Path, planted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(run, data, 1, **options(planted, **FP8, train__steps=1))
    assert train(run, data, 1, **options(planted, **FP8)) == alone


@pytest.mark.slow
def test_what_overflows_in_fp16_is_promoted_in_the_order_of_execution(
    data: Path, planted: Path, tmp_path: Path
) -> None:
    made = train(tmp_path / "run", data, 1, **options(planted, **FP16, train__steps=12))
    assert {layer for _, layer, _ in made} >= {"model.layers.1.mlp.up_proj"}
    assert {layer for _, layer, _ in made} <= PLANTED
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["skipped"]
    assert not rows[-1]["skipped"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"precision__adaptive": "true", "precision__monitor_every": 5}, "precision.ladder=[]"),
        ({"precision__ladder": "[fp8_tensorwise,bf16]"}, "only adaptive precision has one"),
        ({**FP8, "precision__ladder": "[bf16,fp8_tensorwise]"}, "is no wider than"),
        ({**FP8, "precision__monitor_every": 0}, "it samples never"),
        ({**FP8, "precision__compute": "bf16"}, "lowest rung"),
        ({"precision__compute": "fp9"}, "no such format"),
        ({"precision": "bf16_mixed", "precision__compute": "fp32"}, "wider than what linear layers exchange"),
        ({"precision__high_first": 1}, "precision.compute is empty"),
        ({"precision__rules": "[{match: '*.nothing', compute: bf16}]"}, "matches no linear layer"),
        ({"precision__rules": "[{match: '*'}]"}, "not a pattern and a format"),
        ({"precision": "tf32"}, "a CPU has no TF32"),
        ({"precision": "tf32", "precision__compute": "fp32"}, "multiplies all fp32 operands in TF32"),
        ({"precision": "fp64", "precision__state": "8bit"}, "has optimizer states in fp64"),
        ({"precision__static_scale": 1024}, "has no loss scale"),
        ({"precision__emulate": "true"}, "has no format to emulate"),
        ({"precision__compute": "fp8_tensorwise", "precision__high_first": 9}, "no linear layer takes it"),
        ({**FP8, "precision__rules": "[{match: '*', compute: fp8_rowwise}]"}, "no linear layer takes it"),
        ({**FP8, "precision__compute": "mxfp8", "precision__ladder": "[mxfp8,bf16]"}, "blocks have scales"),
        ({**FP16, "train__on_nonfinite": "rollback"}, "promotes a layer that overflows fp16"),
        ({"precision": "tf32", "engine__fp32_matmul": "highest"}, "computes products in high"),
        ({"precision": "fp64", "engine__compile": "true"}, "not with precision.kind=fp64"),
        ({"precision__compute": "fp8_tensorwise", "engine": "deepspeed"}, "not with engine=deepspeed"),
    ],
)
def test_bad_input(
    data: Path,
    tmp_path: Path,
    given: dict[str, object],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert words in refused(capsys, ["train", *arguments(tmp_path / "run", data, **given)])


def test_a_rollback_samples_no_step_that_was_undone(data: Path, tmp_path: Path) -> None:
    """Steps 4 and 5 of the rest are sampled again, as all of the first eight are."""
    run = tmp_path / "run"
    given = {**FP8, **BACK, "precision__monitor_every": 100}
    assert planted_run(1, run, data, bad_row(data, 4), **given) == ""
    lines = [json.loads(line) for line in (run / "numerics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert not any(line["skipped"] for line in lines)
    states = marker.read_progress(run / "checkpoints" / "step-00000003").states
    assert set(states["adaptive"]["layers"]) == {
        f"model.layers.{layer}.{name}"
        for layer in range(4)
        for name in (*(f"self_attn.{each}_proj" for each in "qkvo"), *(f"mlp.{each}_proj" for each in UPS))
    }


@pytest.mark.parametrize("command", ["bench", "parity"])
def test_commands_that_adapt_nothing_say_so(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"{key.replace('__', '.')}={value}" for key, value in FP8.items()]
    assert "in formats that do not change" in refused(capsys, [command, "model=tiny", *given])


def changed_often(case: Case) -> list[float]:
    """Losses of steps between which the formats of single layers change."""
    engine = cases.start(case)
    found = []
    for step in range(10):
        name = ("gate_proj", "up_proj", "down_proj")[step % 3]
        engine.change_formats({f"model.layers.{step}.mlp.{name}": "bf16"})
        found.append(float(engine.train_step(case.batches(step, dp_rank=0, dp=1), lr=case.lr).loss))
    return found


@pytest.mark.slow
def test_compiled_layers_follow_more_changes_than_torch_compiles_by_default() -> None:
    """Ten layers of which each has been changed in another way or at another time."""
    given = {name.replace("__", "."): value for name, value in FP8.items()}
    given |= {"precision.adaptive": True, "precision.ladder": ["fp8_tensorwise", "bf16"]}
    fields = cases.model(num_hidden_layers=10)
    eager = Case(fields=fields, overrides=tuple(given.items()))
    compiled = dataclasses.replace(
        eager, overrides=(*eager.overrides, ("engine.compile", True), ("engine.compile_backend", "eager"))
    )
    (ours,), (theirs,) = (run_ranks(1, changed_often, case) for case in (compiled, eager))
    assert ours == pytest.approx(theirs, rel=1e-6)
