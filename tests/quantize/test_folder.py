"""Written folders: plain transformers computes what we do in memory, in as many bytes as the format says."""

from __future__ import annotations

import json
import subprocess
import sys
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
    *("fp8_e4m3", "fp8_e4m3-a8", "nvfp4", "mxfp4", "fp8_e5m2", "fp8_e5m2-tensor"),
)
FRESH = """
import sys
import torch, transformers
out, batch, logits = sys.argv[1:]
kind = getattr(transformers, transformers.AutoConfig.from_pretrained(out).architectures[0])
with torch.no_grad():
    torch.save(kind.from_pretrained(out, dtype="auto").eval()(torch.load(batch)).logits, logits)
"""


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    pytest.importorskip("compressed_tensors", reason="not installed: pip install 'hybridtrain[quantize]'")


def fresh_logits(out: Path, ids: torch.Tensor, folder: Path) -> torch.Tensor:
    """Of a process that has transformers alone."""
    batch, found = folder / "batch.pt", folder / "logits.pt"
    torch.save(ids, batch)
    subprocess.run([sys.executable, "-c", FRESH, str(out), str(batch), str(found)], check=True, timeout=300)
    return torch.load(found)


def check(kind: str, name: str, folder: Path) -> None:
    if name.startswith("fp8_e5m2"):
        pytest.importorskip("torchao", reason="not installed: pip install 'hybridtrain[torchao]'")
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
            walk.place(ours, each)
            count = each.linear.outputs * each.linear.inputs
            bits += each.scheme.stored_bits(each.linear.outputs, each.linear.inputs) - 16 * count
    batch = rows(4)[0]
    with torch.no_grad():
        a, b = (
            logits(model, batch.input_ids_BT, position_ids_BT=batch.position_ids_BT)
            for model in (ours, plain(out, "auto"))
        )
    if name.startswith("fp8_e5m2"):
        assert torch.equal(a, fresh_logits(out, batch.input_ids_BT, folder))
    assert b.dtype == dtype
    assert torch.equal(a, b), (a - b).abs().max()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    expected = 2 * sum(parameter.numel() for parameter in ours.parameters()) + bits / 8
    assert index["metadata"]["total_size"] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", ["fp16", "int8-a8", "int3-g32", "nvfp4", "fp8_e5m2"])
def test_plain_transformers_computes_the_same(name: str, tmp_path: Path) -> None:
    check("llama", name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("name", ["int8-tensor", "int3-g32", "int4-g32", "fp8_e4m3", "mxfp4"])
def test_plain_transformers_computes_the_same_of_experts(kind: str, name: str, tmp_path: Path) -> None:
    check(kind, name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "bert"])
@pytest.mark.parametrize("name", WRITTEN)
def test_plain_transformers_computes_the_same_of_every_model(kind: str, name: str, tmp_path: Path) -> None:
    check(kind, name, tmp_path)


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("mixtral", "nvfp4", "transformers does not read experts in it"),
        ("mixtral", "int8-a8", "transformers does not read experts in it"),
        (
            "llama",
            "nf4",
            "bitsandbytes alone, which multiplies in kernels of its own",
        ),
        ("llama", "codebook4", "no format has codebook4"),
        ("llama", "fp8_e5m2-a8", "torchao rounds inputs on GPUs alone"),
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
    if name.startswith("fp8_e5m2"):
        pytest.importorskip("torchao", reason="not installed: pip install 'hybridtrain[torchao]'")
    source = write(tmp_path / "source", kind)
    argv = [f"run.dir={tmp_path / 'none'}", f"quantize.source={source}", f"quantize.scheme={name}"]
    assert main(["quantize", *argv, f"quantize.out={tmp_path / 'out'}"]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_plan_is_in_the_format_of_one_library(tmp_path: Path, capsys) -> None:
    """torchao has e5m2 and e4m3, each layer in its own; with int8 beside them no library has all."""
    pytest.importorskip("torchao", reason="not installed: pip install 'hybridtrain[torchao]'")
    source = write(tmp_path / "source", "llama")
    up, down = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"

    def quantise(out: Path, other: str) -> int:
        (tmp_path / "plan.yaml").write_text(f"layers: {{{up}: fp8_e5m2-tensor, {down}: {other}}}")
        argv = [f"run.dir={tmp_path / 'none'}", f"quantize.source={source}", f"quantize.out={out}"]
        return main(["quantize", *argv, f"quantize.plan={tmp_path / 'plan.yaml'}"])

    assert quantise(tmp_path / "mixed", "int8") == 2
    words = "fp8_e5m2-tensor is stored by torchao, int8 by compressed-tensors"
    assert words in four_parts(capsys.readouterr().err, "quantize.plan")
    assert quantise(tmp_path / "out", "fp8_e4m3") == 0
    model, (config, weights) = plain(source, torch.bfloat16), opened(source)
    names = {up: "fp8_e5m2-tensor", down: "fp8_e4m3"}
    plan = {path: schemes.parse(name, field="quantize.plan") for path, name in names.items()}
    layers = walk.layers(
        config, weights, lambda linear: plan.get(linear.path), rows=[], device=torch.device("cpu"), field="x"
    )
    for each in (each for layer in layers for each in layer):
        walk.place(model, each)
    ids = rows(4)[0].input_ids_BT
    with torch.no_grad():
        assert torch.equal(model(ids).logits, fresh_logits(tmp_path / "out", ids, tmp_path))


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
