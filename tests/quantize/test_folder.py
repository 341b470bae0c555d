"""Written folders: plain transformers computes what we do in memory, in as many bytes as the format says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hybridtrain.cli.main import main
from hybridtrain.models.build import logits
from hybridtrain.quantize import schemes, walk
from tests.quantize.folders import opened, plain, rows, write
from tests.runs import four_parts

WRITTEN = (
    *("bf16", "fp16", "int8", "int8-tensor", "int8-a8", "int4-g32", "int3-g32", "int2-g16", "int4-row"),
    *("fp8_e4m3", "fp8_e4m3-a8", "nvfp4", "mxfp4"),
)


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    pytest.importorskip("compressed_tensors", reason="not installed: pip install 'hybridtrain[quantize]'")


def check(kind: str, name: str, folder: Path) -> None:
    source, out = write(folder / "source", kind), folder / "out"
    argv = [f"run.dir={folder / 'none'}", f"quantize.source={source}", f"quantize.scheme={name}"]
    assert main(["quantize", *argv, f"quantize.out={out}"]) == 0
    scheme = schemes.parse(name, field="quantize.scheme")
    dtype = torch.float16 if name == "fp16" else torch.bfloat16
    ours, (config, weights) = plain(source, dtype), opened(source)
    bits = 0
    if scheme.share:
        layers = walk.layers(
            config, weights, lambda _: scheme, rows=[], device=torch.device("cpu"), field="quantize.scheme"
        )
        for each in (each for layer in layers for each in layer):
            walk.put(ours.get_submodule(each.linear.path), each)
            count = each.linear.outputs * each.linear.inputs
            bits += each.scheme.stored_bits(each.linear.outputs, each.linear.inputs) - 16 * count
    theirs = plain(out, "auto")
    batch = rows(4)[0]
    with torch.no_grad():
        a, b = (
            logits(model, batch.input_ids_BT, position_ids_BT=batch.position_ids_BT)
            for model in (ours, theirs)
        )
    assert b.dtype == dtype
    assert torch.equal(a, b), (a - b).abs().max()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    expected = 2 * sum(parameter.numel() for parameter in ours.parameters()) + bits / 8
    assert index["metadata"]["total_size"] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", ["fp16", "int8-a8", "int3-g32", "nvfp4"])
def test_plain_transformers_computes_the_same(name: str, tmp_path: Path) -> None:
    check("llama", name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "bert"])
@pytest.mark.parametrize("name", WRITTEN)
def test_plain_transformers_computes_the_same_of_every_model(kind: str, name: str, tmp_path: Path) -> None:
    check(kind, name, tmp_path)


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("mixtral", "int8", "holds the weights of all experts in one parameter"),
        ("llama", "nf4", "compressed-tensors has no nf4"),
        (
            "llama",
            "int4-g32-affine",
            "zero points, products that are added and changed biases are",
        ),
        ("llama", "int4-g64", "has rows of 96 weights, which are not whole groups of 64"),
        ("gpt2", "int8", "the model stores weights transposed, as GPT-2"),
        ("llama", "int4-g32-gptq", "no data chosen"),
    ],
)
def test_what_no_folder_holds(kind: str, name: str, words: str, tmp_path: Path, capsys) -> None:
    source = write(tmp_path / "source", kind)
    argv = [f"run.dir={tmp_path / 'none'}", f"quantize.source={source}", f"quantize.scheme={name}"]
    assert main(["quantize", *argv, f"quantize.out={tmp_path / 'out'}"]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_quantised_source_and_a_folder_of_the_users(tmp_path: Path, capsys) -> None:
    source = write(tmp_path / "source", "llama")
    argv = [f"run.dir={tmp_path / 'none'}", "quantize.scheme=int8"]
    out = tmp_path / "out"
    assert main(["quantize", *argv, f"quantize.source={source}", f"quantize.out={out}"]) == 0
    assert main(["quantize", *argv, f"quantize.source={out}", f"quantize.out={tmp_path / 'again'}"]) == 2
    four_parts(capsys.readouterr().err, "quantize.source")
    assert main(["quantize", *argv, f"quantize.source={source}", f"quantize.out={source}"]) == 2
    assert "it exists and is not an earlier export" in four_parts(capsys.readouterr().err, "quantize.out")
    again = [f"quantize.source={source}", f"quantize.out={out}", "quantize.scheme=bf16"]
    assert main(["quantize", argv[0], *again]) == 0  # replaces its own
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
