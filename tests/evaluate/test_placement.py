"""Models larger than the memory that they may take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hybridtrain import evaluate
from hybridtrain.cli.main import main
from hybridtrain.config.schema import InferenceConfig
from hybridtrain.errors import UserError
from hybridtrain.models.build import logits
from tests.quantize.folders import plain, rows
from tests.quantize.limited import write
from tests.runs import four_parts

ALL, SOME, NEXT_TO_NOTHING = 1.0, 6e-4, 1e-6


def loaded(source: Path, size: float):
    inference = InferenceConfig(max_memory_gb=size)
    return evaluate.load_within(inference, str(source), field="generate.source", trust_remote_code=False)


def test_weights_on_disk(tmp_path: Path) -> None:
    write(tmp_path / "model", layers=4, hidden=128, dtype="bfloat16")
    expected, batch = plain(tmp_path / "model", "auto"), rows(4)[0]
    for size in (ALL, SOME, NEXT_TO_NOTHING):
        model = loaded(tmp_path / "model", size)
        places = {each.device.type for each in model.parameters()}
        assert places == {ALL: {"cpu"}, SOME: {"cpu", "meta"}, NEXT_TO_NOTHING: {"meta"}}[size]
        with torch.no_grad():
            a, b = (
                logits(each, batch.input_ids_BT, position_ids_BT=batch.position_ids_BT)
                for each in (expected, model)
            )
            texts = [
                each.generate(batch.input_ids_BT[:1, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)
                for each in (expected, model)
            ]
        assert torch.equal(a, b)
        assert torch.equal(*texts)


def test_what_needs_its_weights_in_memory(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="not installed: pip install 'hybridtrain[quantize]'")
    source, out = tmp_path / "model", tmp_path / "out"
    write(source, layers=4, hidden=128, dtype="bfloat16")
    argv = [f"run.dir={tmp_path / 'none'}", f"quantize.source={source}", "quantize.scheme=int8-a8"]
    assert main(["quantize", *argv, f"quantize.out={out}"]) == 0
    assert loaded(out, ALL).model.layers[0].mlp.up_proj.weight.device.type == "cpu"
    with pytest.raises(UserError) as refused:
        loaded(out, SOME)
    words = four_parts(str(refused.value), "generate.source")
    assert "neither torchao nor compressed-tensors reads quantised weights from disk" in words
    assert "inference.max_memory_gb" in words
