"""Layers whose inputs are rounded, on texts that their scales do not fit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from hybridtrain import evaluate
from hybridtrain.cli.main import main
from hybridtrain.evaluate.guard import Guard
from hybridtrain.models.build import logits
from tests.quantize.folders import rows
from tests.runs import four_parts

pytest.importorskip("compressed_tensors", reason="not installed: pip install 'hybridtrain[quantize]'")
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def quantised(trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantised") / "out"
    assert main(["quantize", str(trained.run), "quantize.scheme=int8-a8s", f"quantize.out={out}"]) == 0
    return out


def loaded(folder: Path):
    return evaluate.load_model(str(folder), field="generate.source", trust_remote_code=False)


def of(model) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(
            [logits(model, each.input_ids_BT, position_ids_BT=each.position_ids_BT) for each in rows(8)]
        )


def hooks(module) -> int:
    """Of a linear layer."""
    of_layer = isinstance(module, torch.nn.Linear)
    return of_layer * (len(module._forward_pre_hooks) + len(module._forward_hooks))


def test_off_or_without_reason_nothing_changes(quantised: Path) -> None:
    model = loaded(quantised)
    off = Guard(model, on=False)
    assert all(not hooks(module) for module in model.modules())
    expected = of(model)
    on = Guard(model, on=True)
    assert sum(hooks(module) for module in model.modules()) == 2 * 28
    assert torch.equal(of(model), expected)
    assert (off.lines(), on.lines()) == ([], [])
    assert set(on.calls.values()) == {2}
    assert LAYER in on.calls


@pytest.mark.parametrize(
    ("scale", "why"), [(0.02, "inputs saturate"), (float("inf"), "the output is not finite")]
)
def test_a_scale_that_does_not_fit(scale: float, why: str, quantised: Path) -> None:
    """The layer computes with inputs as they are; all others as before."""
    model = loaded(quantised)
    model.get_submodule(LAYER).quantization_enabled = False
    expected = of(model)
    model.get_submodule(LAYER).quantization_enabled = True
    model.get_submodule(LAYER).input_scale.data *= scale
    spoilt = of(model)
    watched = Guard(model, on=True)
    assert torch.equal(of(model), expected)
    assert not torch.allclose(spoilt, expected, atol=0.05)
    assert watched.lines()[0] == f"{LAYER}: 2 of 2 calls in bfloat16, inputs unrounded: {why}"
    assert "quantize.prompts_file=FILE" in watched.lines()[1]
    assert len(watched.lines()) == 2


def test_generate_from_a_quantised_folder(trained, quantised: Path, tmp_path: Path, capsys) -> None:
    """Several prompts, a chat, and scales from the prompts themselves."""
    folder, file = tmp_path / "folder", tmp_path / "prompts.txt"
    shutil.copytree(quantised, folder)
    (folder / "chat_template.jinja").write_text("{{ messages[-1]['content'] }} follows")
    file.write_text("number 4 follows\n" * 16)
    argv = ["generate", f"generate.source={folder}", "generate.max_new_tokens=4", "generate.temperature=0"]
    capsys.readouterr()
    assert main([*argv, f"generate.prompts_file={file}"]) == 0
    out = capsys.readouterr().out
    alone = out.split("[2]")[0].removeprefix("[1]\n").strip()
    assert out.count(alone) == 16
    assert main([*argv, "generate.prompt=number 4", "generate.chat=true"]) == 0
    assert f"number 4 follows{capsys.readouterr().out.rstrip()}" == alone
    argv = ["quantize", str(trained.run), "quantize.scheme=int8-a8s", f"quantize.out={tmp_path / 'own'}"]
    assert main([*argv, f"quantize.prompts_file={file}"]) == 0
    one, other = (loaded(each).get_submodule(LAYER).input_scale for each in (quantised, tmp_path / "own"))
    assert not torch.equal(one, other)
    file.write_text("few")
    assert main([*argv, f"quantize.prompts_file={file}"]) == 2
    assert "fewer than a row of 32" in four_parts(capsys.readouterr().err, "quantize.prompts_file")
