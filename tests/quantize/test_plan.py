"""A scheme for each layer: the search, the file, and the folder that is written from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from hybridtrain.cli.main import main
from hybridtrain.errors import UserError
from hybridtrain.models.linears import Linear
from hybridtrain.quantize import auto, joined, plan, schemes, search, walk
from hybridtrain.quantize.experts import Part, linears_of
from tests.quantize.folders import opened, plain, rows, write
from tests.runs import four_parts

pytest.importorskip("compressed_tensors", reason="not installed: pip install 'hybridtrain[quantize]'")


def quantised(path: str, name: str) -> walk.Quantised:
    linear = Linear(path, 0, 1, 32, 32, router=False)
    scheme = schemes.parse(name, field="quantize.ladder")
    return walk.Quantised(linear, scheme, None, torch.zeros(32, 32), None, None, None, None)


def test_the_step_that_saves_most_for_its_divergence_comes_first() -> None:
    layers = {
        path: [[quantised(path, name)] for name in ("bf16", "int8", "int4-g32")] for path in ("a", "b", "c")
    }
    divergences = {"a": [0.0, 1.0, 1.1], "b": [0.0, 0.1, 5.0], "c": [0.0, 0.0, 0.0]}
    steps = search.greedy(layers, divergences)
    assert [(step.path, step.to) for step in steps] == [("c", 2), ("b", 1), ("a", 2), ("b", 2)]
    assert sum(step.divergence for step in steps) == pytest.approx(1.1 + 5.0)


@pytest.mark.parametrize(("kind", "block"), [("llama", 0), ("bert", 1), ("mixtral", 1)])
def test_layers_that_read_the_same_input(kind: str, block: int, tmp_path: Path) -> None:
    folder = write(tmp_path, kind)
    linears = linears_of(opened(folder)[0])
    model = plain(folder, torch.float32)
    found = joined.sets(model, linears, rows(4)[0], joined=True)
    here = [[path.partition(f".{block}.")[2] for path in paths] for paths in found if len(paths) > 1]
    layers = {
        "llama": [[f"self_attn.{name}_proj" for name in "qkv"], ["mlp.gate_proj", "mlp.up_proj"]],
        "bert": [[f"attention.self.{name}" for name in ("query", "key", "value")]],
        "mixtral": [[f"self_attn.{name}_proj" for name in "qkv"]],
    }[kind]
    assert [paths for paths in here if all(paths)] == layers
    assert sum(map(len, found)) == len(linears)
    apart = joined.sets(model, linears, rows(4)[0], joined=False)
    experts = [linear.path for linear in linears if isinstance(linear, Part)]
    assert [paths for paths in apart if len(paths) > 1] == ([experts] if experts else [])


def test_layers_of_one_scheme_step_together() -> None:
    uniform = [{path: quantised(path, name) for path in "abc"} for name in ("bf16", "int8")]
    together = joined.candidates(uniform, [["a", "c"], ["b"]])
    steps = search.greedy(together, {"a": [0.0, 1.0], "b": [0.0, 0.6]})
    assert [(step.path, step.to) for step in steps] == [("a", 1), ("b", 1)]  # two layers for 1.0, one for 0.6


def test_a_ladder_descends() -> None:
    assert [scheme.name for scheme in auto.ladder(["bf16", "int8", "int4-g32"])] == [
        "bf16",
        "int8",
        "int4-g32",
    ]
    for names in (["int8"], ["int4-g32", "int8"], ["int8", "fp8_e4m3"]):
        with pytest.raises(UserError) as caught:
            auto.ladder(names)
        assert "fewer bits" in four_parts(str(caught.value), "quantize.ladder")


def test_files_of_plans(tmp_path: Path) -> None:
    linears = [Linear(f"layers.0.{name}", 0, 1, 32, 32, router=False) for name in ("up", "down")]
    first = plan.uniform(schemes.parse("int8", field="quantize.scheme"), linears)
    plan.write(first, tmp_path / "plan.yaml", comment="two\nlines")
    assert (tmp_path / "plan.yaml").read_text().startswith("# two\n# lines\nlayers:\n")
    assert plan.read(tmp_path / "plan.yaml", linears) == first
    for text, words in (
        ("layers: {layers.0.upp: int8}", "the model has no linear layer layers.0.upp"),
        ("layers: {layers.0.up: int9}", "no codes are named 'int9'"),
        ("[1, 2]", "it has no layers"),
        ("layers: {", "while parsing"),
    ):
        (tmp_path / "other.yaml").write_text(text)
        with pytest.raises(UserError) as caught:
            plan.read(tmp_path / "other.yaml", linears)
        assert words in four_parts(str(caught.value), "quantize.plan")
    with pytest.raises(UserError):
        plan.read(tmp_path / "none.yaml", linears)


def test_layers_are_put_back(tmp_path: Path) -> None:
    folder = write(tmp_path, "gpt2")
    config, source = opened(folder)
    scheme = schemes.parse("int4-g32-bias-a8".replace("int4-g32", "int8"), field="x")
    layers = [
        each
        for layer in walk.layers(
            config, source, lambda _: scheme, rows=rows(4), device=torch.device("cpu"), field="x"
        )
        for each in layer
    ]
    model = plain(folder, torch.float32)
    ids = rows(4)[0].input_ids_BT
    with torch.no_grad():
        before = model(ids).logits
        with walk.changed(model, layers):
            assert not torch.equal(model(ids).logits, before)
        assert torch.equal(model(ids).logits, before)


def test_of_a_run(trained, tmp_path: Path, capsys) -> None:
    """A plan within its budget, another by hand, and the table of `compare`."""
    out = tmp_path / "planned"
    argv = [str(trained.run), "quantize.plan=auto", "quantize.budget=0.05", f"quantize.out={out}"]
    argv += ["quantize.ladder=[bf16,int8,int2-g16]", "quantize.rows=8"]
    assert main(["quantize", *argv]) == 0
    shown = capsys.readouterr().out
    results = json.loads((out / "plan.json").read_text())
    assert results["verified"]["at_most"] <= 0.05
    assert [each["name"] for each in results["candidates"]] == [
        *("bf16", "int8", "int2-g16"),
        *("plan", "as written"),
    ]
    plan_row, folder = results["candidates"][-2:]
    assert plan_row["loss_change"] == folder["loss_change"]  # what was verified is what is written
    assert results["written"]["mean"] < 0.1
    kl = {each["name"]: each["kl"]["mean"] for each in results["candidates"]}
    assert kl["bf16"] < kl["int8"] < kl["int2-g16"]
    assert f"budget {0.05:.3%}" in shown
    content = yaml.safe_load((out / "plan.yaml").read_text())
    for path in [path for path in content["layers"] if path.endswith("q_proj")]:
        assert len({content["layers"][path.replace("q_proj", f"{name}_proj")] for name in "qkv"}) == 1
    content["layers"]["model.layers.0.mlp.up_proj"] = "int8-a8"
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    argv = [str(trained.run), f"quantize.plan={tmp_path / 'mine.yaml'}", f"quantize.out={tmp_path / 'mine'}"]
    assert main(["quantize", *argv]) == 0
    groups = json.loads((tmp_path / "mine/config.json").read_text())["quantization_config"]["config_groups"]
    assert ["model.layers.0.mlp.up_proj"] in [group["targets"] for group in groups.values()]
    capsys.readouterr()
    sources = [str(trained.run / "export"), str(out), str(tmp_path / "mine")]
    more = ["compare.schemes=[int8,int4-g32-gptq]", "compare.dtypes=[bfloat16]", "compare.calibration_rows=8"]
    json_file = tmp_path / "compare.json"
    argv = [*sources, f"run.dir={trained.run}", *more, f"compare.out={json_file}"]
    assert main(["compare", *argv]) == 0, capsys.readouterr().err
    table = json.loads(json_file.read_text())
    names = [each["name"] for each in table["candidates"]]
    assert names == [str(out), str(tmp_path / "mine"), "bfloat16", "int8", "int4-g32-gptq"]
    assert table["reference"]["name"] == sources[0]
    assert all(each["kl"]["mean"] > 0 for each in table["candidates"])
    assert set(table["candidates"][-1]["output_errors"]) == set(content["layers"])


def test_what_is_compared_has_the_same_tokens(trained, tmp_path: Path, capsys) -> None:
    other = write(tmp_path / "other", "llama")
    argv = [str(trained.run / "export"), str(other), f"run.dir={trained.run}"]
    assert main(["compare", *argv]) == 2
    assert "it has 256 tokens, the reference 300" in four_parts(capsys.readouterr().err, "compare.sources")
    assert main(["compare", str(trained.run)]) == 2
    assert "there is nothing to compare" in four_parts(capsys.readouterr().err, "compare.sources")
    assert main(["compare", str(trained.run), "compare.dtypes=[bf16]"]) == 2
    four_parts(capsys.readouterr().err, "compare.dtypes")
    assert main(["compare", str(trained.run), "compare.schemes=[int8,int4-wide]"]) == 2
    four_parts(capsys.readouterr().err, "compare.schemes")
    assert (
        main(["compare", str(trained.run), "compare.schemes=[int4-g32-gptq]", "compare.calibration_rows=1"])
        == 2
    )
    assert "fewer than the" in four_parts(capsys.readouterr().err, "compare.calibration_rows")
