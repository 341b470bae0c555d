"""Experts in parameters of three dimensions: each calibrated on its own tokens, and written as it is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybridtrain.cli.main import main
from hybridtrain.models import build
from hybridtrain.models.build import logits
from hybridtrain.quantize import experts, plan, schemes, walk
from hybridtrain.quantize.experts import Part, linears_of
from hybridtrain.quantize.schemes import Scheme
from tests.cases import model
from tests.quantize.folders import opened, plain, rows, write
from tests.quantize.test_folder import fresh_logits
from tests.runs import four_parts

EXPERTS = "model.layers.{}.mlp.experts"


def parse(name: str) -> Scheme:
    return schemes.parse(name, field="quantize.scheme")


def quantised(folder: Path, choose: walk.Choose, *, count: int) -> list[walk.Quantised]:
    config, source = opened(folder)
    cpu = torch.device("cpu")
    found = walk.layers(config, source, choose, rows=rows(count) if count else [], device=cpu, field="x")
    return [each for layer in found for each in layer]


def test_an_expert_is_calibrated_on_the_tokens_that_it_is_given(tmp_path: Path, caplog) -> None:
    """Errors of outputs on these tokens, found from what the router chose; where they are fewer than columns
    the matrix is rounded, and it is said."""
    folder = write(tmp_path, "mixtral")
    model, seen = plain(folder, torch.float32), []
    module = model.model.layers[0].mlp.experts
    module.register_forward_pre_hook(lambda _, given: seen.append(given[:2]))
    with torch.no_grad():
        logits(model, rows(4)[0].input_ids_BT, position_ids_BT=rows(4)[0].position_ids_BT)
    [(hidden, chosen)] = seen

    def tokens(expert: int) -> Tensor:
        return hidden[(chosen == expert).any(-1)]

    scheme = parse("int3-g32-gptq")
    first = [linear for linear in linears_of(opened(folder)[0]) if linear.path.endswith("w1")][:4]
    wanted = {linear.path for linear in first}  # all else stays as it is, and so do the tokens
    layers = quantised(folder, lambda each: scheme if each.path in wanted else None, count=4)
    rounded = quantised(folder, lambda each: parse("int3-g32") if each.path in wanted else None, count=0)
    few = [linear.path for linear in first if len(tokens(linear.expert)) < linear.inputs]
    assert 0 < len(few) < 4
    assert f"{EXPERTS.format(0)}: {len(few)} of 4 matrices saw fewer" in caplog.text
    for each, plainly in zip(layers, rounded, strict=True):
        part, x = each.linear, tokens(each.linear.expert)
        weight = module.gate_up_proj[part.expert, part.start : part.start + part.outputs]
        error = ((each.weight() - weight) @ x.T).square().mean() / (weight @ x.T).square().mean()
        assert each.error == pytest.approx(error.item(), rel=1e-3)
        assert torch.equal(each.weight(), plainly.weight()) == (part.path in few)


def test_they_are_put_back(tmp_path: Path) -> None:
    folder = write(tmp_path, "qwen3_moe")
    model, ids = plain(folder, torch.float32), rows(4)[0].input_ids_BT
    layers = quantised(folder, lambda each: parse("int4-g32") if isinstance(each, Part) else None, count=0)
    assert len(layers) == 2 * 4 * 3
    with torch.no_grad():
        before = model(ids).logits
        with walk.changed(model, layers):
            assert not torch.equal(model(ids).logits, before)
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(
    ("kind", "others", "own"),
    [
        ("mixtral", "int8", "int4-g32"),
        pytest.param("mixtral", "int4-g32", "", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "", "int4-g32", marks=pytest.mark.slow),
    ],
)
def test_a_plan_for_experts_and_others(kind: str, others: str, own: str, tmp_path: Path) -> None:
    """Experts in a scheme of their own, or left as they are, in a fresh process of transformers."""
    pytest.importorskip("compressed_tensors", reason="not installed: pip install 'hybridtrain[quantize]'")
    source = write(tmp_path / "source", kind)
    config, _ = opened(source)
    names = {experts.key(each): own if isinstance(each, Part) else others for each in linears_of(config)}
    chosen = {path: parse(name) for path, name in names.items() if name}
    plan.write(chosen, tmp_path / "plan.yaml", comment="")
    argv = [f"run.dir={tmp_path / 'none'}", f"quantize.source={source}", f"quantize.out={tmp_path / 'out'}"]
    assert main(["quantize", *argv, f"quantize.plan={tmp_path / 'plan.yaml'}"]) == 0
    assert plan.read(tmp_path / "out/plan.yaml", linears_of(config)) == chosen
    model, ids = plain(source, torch.bfloat16), rows(4)[0].input_ids_BT
    bits = 0
    for each in quantised(source, plan.choice(chosen), count=0):
        walk.place(model, each)
        count = each.linear.outputs * each.linear.inputs
        bits += each.scheme.stored_bits(each.linear.outputs, each.linear.inputs) - 16 * count
    with torch.no_grad():
        assert torch.equal(model(ids).logits, fresh_logits(tmp_path / "out", ids, tmp_path))
    expected = 2 * sum(parameter.numel() for parameter in model.parameters()) + bits / 8
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("first", "second", "dtype", "words"),
    [
        ("int8", "int4-g32", "bfloat16", "transformers reads all in one scheme"),
        ("int8", "bf16", "bfloat16", "in no codes: transformers reads all in one scheme"),
        ("int8", "int8", "float32", "transformers computes the weights of experts in bfloat16"),
    ],
)
def test_experts_that_would_be_read_as_others(
    first: str, second: str, dtype: str, words: str, tmp_path: Path, capsys
) -> None:
    pytest.importorskip("compressed_tensors", reason="not installed: pip install 'hybridtrain[quantize]'")
    source = write(tmp_path / "source", "mixtral")
    layers = {EXPERTS.format(0): first, EXPERTS.format(1): second}
    (tmp_path / "plan.yaml").write_text(f"layers: {json.dumps(layers)}")
    argv = [f"run.dir={tmp_path / 'none'}", f"quantize.source={source}", f"quantize.out={tmp_path / 'out'}"]
    argv += [f"quantize.plan={tmp_path / 'plan.yaml'}", f"quantize.dtype={dtype}"]
    assert main(["quantize", *argv]) == 2
    assert words in four_parts(capsys.readouterr().err, "quantize.plan")


def test_experts_that_files_hold_whole() -> None:
    fields = model("gpt_oss", num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2)
    meta = build.meta_model(build.hf_config(fields, chosen={}, attention="eager"))
    assert experts.unknown(meta) == "model.layers.0.mlp.experts.gate_up_proj"
