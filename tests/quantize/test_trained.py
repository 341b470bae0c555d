"""A run whose weights were rounded in training: the folder that is quantised without a scheme has them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hybridtrain.cli.main import main
from hybridtrain.models.build import logits
from hybridtrain.models.linears import is_linear
from hybridtrain.plan.formats import FORMATS, SCHEMES
from hybridtrain.precision import integers
from hybridtrain.precision.qlinear import Product, convert, weight_scale
from tests.quantize.folders import plain, rows
from tests.runs import arguments, assert_equal_state, checkpoints, finished, four_parts, tensors
from tests.runs import rows as lines

pytest.importorskip("compressed_tensors", reason="not installed: pip install 'hybridtrain[quantize]'")

RULES = "[{match: '*.down_proj', compute: qat_int8}, {match: '*.o_proj', compute: high}]"


def format_of(path: str) -> str:
    """What RULES and precision=qat_int4 give a linear layer; empty: high."""
    return "qat_int8" if path.endswith("down_proj") else "" if path.endswith("o_proj") else "qat_int4"


def product_of(path: str) -> Product | None:
    name = format_of(path)
    return Product(FORMATS[name], "", None, native=False) if name else None


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounded") / "run"
    options = {"precision": "qat_int4", "precision__rules": RULES, "train__steps": 2, "checkpoint__every": 2}
    options["precision__monitor_every"] = 1
    said = finished(1, arguments(folder, data, **options)).out
    assert "qat_int4: 20 linear layers" in said
    assert "weights rounded as int4-g32 stores them" in said
    line = json.loads((folder / "numerics.jsonl").read_text().splitlines()[0])
    assert line["formats"] == {"x": "e4m3", "w": "int4", "g": "e5m2", "y": "e4m3"}
    watched = line["modules"]["model.layers.0.mlp.up_proj"]
    assert 6 < watched["w"]["snr"] < 24 < watched["x"]["snr"]  # 3 bits and one scale a tensor, 4 bits
    assert main(["export", str(folder)]) == 0
    return folder


def test_the_folder_has_the_weights_that_training_multiplied_by(run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["quantize", str(run), f"quantize.out={out}"]) == 0
    assert "int4-g32 in 20 linear layers, int8 in 4 linear layers, to which" in capsys.readouterr().out
    layers = yaml.safe_load((out / "plan.yaml").read_text())["layers"]
    assert layers == {path: SCHEMES[format_of(path)] for path in layers}
    assert len(layers) == 24

    theirs, ours = plain(out, "auto"), plain(run / "export", torch.bfloat16)
    expected = predicted(theirs)  # which computes the weights from their codes
    state = tensors(next((run / "checkpoints").iterdir()))
    for path, module in ours.named_modules():
        if is_linear(module) and ".layers." in path:
            how, weight = product_of(path), state[f"model.{path}.weight"].bfloat16()
            if how is not None:
                scale = weight_scale(weight, how)
                weight = integers.rounded(weight, scale, how.format.w.largest).bfloat16()
            assert torch.equal(theirs.get_submodule(path).weight, weight), path
            convert(module, how)
    assert torch.equal(predicted(ours), expected)


@torch.no_grad()
def predicted(model: Any) -> torch.Tensor:
    batch = rows(4)[0]
    return logits(model, batch.input_ids_BT, position_ids_BT=batch.position_ids_BT)


@pytest.mark.parametrize("scheme", ["int8", "bf16"])
def test_another_scheme_is_warned_of(run: Path, tmp_path: Path, capsys, scheme: str) -> None:
    out = tmp_path / "out"
    assert main(["quantize", str(run), f"quantize.out={out}", f"quantize.scheme={scheme}"]) == 0
    said = capsys.readouterr().out
    assert "the weights were trained to be stored as int4-g32 in 20 linear layers, int8 in 4" in said
    assert f"with {scheme} they are rounded to values that they were not trained for" in said


def changed(run: Path, tmp_path: Path, **values: Any) -> list[str]:
    """The command that quantises a copy of the export whose record has other values."""
    copy = Path(shutil.copytree(run / "export", tmp_path / "copy"))
    record = json.loads((copy / "hybridtrain.json").read_text())
    (copy / "hybridtrain.json").write_text(json.dumps({**record, **values}))
    return ["quantize", str(run), f"quantize.source={copy}", f"quantize.out={tmp_path / 'out'}"]


def test_an_export_that_was_rounded_otherwise_is_warned_of(run: Path, tmp_path: Path, capsys) -> None:
    assert main(changed(run, tmp_path, dtype="float16")) == 0
    assert "the export is in float16, and training rounded weights in bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize(
    "rounded",
    [
        [],
        {"dtype": "bfloat16", "layers": {}},
        {"dtype": "int4", "layers": {"model.layers.0.mlp.up_proj": "int8"}},
        {"dtype": "float32", "layers": {"x": "int8"}},
    ],
)
def test_a_damaged_record(run: Path, tmp_path: Path, capsys, rounded: Any) -> None:
    assert main(changed(run, tmp_path, rounded=rounded)) == 2
    four_parts(capsys.readouterr().err, "quantize.source")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit(data: Path, tmp_path: Path) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    options = {"precision": "qat_int4", "precision__rules": RULES, "checkpoint__every": 2}
    finished(1, arguments(whole, data, **options, train__steps=4))
    for steps in (2, 4):
        finished(1, arguments(again, data, **options, train__steps=steps))
    assert lines(again) == lines(whole)
    newest = checkpoints(whole)[-1]
    assert_equal_state(again / "checkpoints" / newest, whole / "checkpoints" / newest)
