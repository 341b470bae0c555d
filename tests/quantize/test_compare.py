"""`hybridtrain compare`: what stands beside a reference, the JSON file, and the page."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from hybridtrain.checkpoint import marker
from hybridtrain.cli.main import main
from hybridtrain.config import compose
from hybridtrain.errors import UserError
from hybridtrain.quantize import as_trained as of_training
from hybridtrain.quantize import candidates, speed
from hybridtrain.quantize.source import Source
from hybridtrain.types import Progress
from tests.quantize.folders import write
from tests.runs import arguments, finished, four_parts, rows


def result_of(run: Path, *argv: str) -> dict:
    assert main(["compare", str(run), *argv]) == 0
    return json.loads((run / "compare.json").read_text())


def test_speed_memory_and_the_page(trained, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(speed, "_LEAST_S", 0.005)
    run = shutil.copytree(trained.run, tmp_path / "run")
    argv = ["compare.dtypes=[bfloat16,autocast_bf16]", "compare.schemes=[int8,int8-a8s]", "compare.speed=8"]
    result = result_of(run, *argv, "compare.rows=4", "compare.calibration_rows=8")
    own, narrow, autocast, int8, _ = result["reference"], *result["candidates"]
    assert result["timed"]["tokens"] == {"prefill": 24, "decode": 8}
    for each in (own, narrow, autocast):
        for figure in each["speed"].values():
            assert 0 < figure["tokens_per_s_least"] <= figure["tokens_per_s"] <= figure["tokens_per_s_most"]
    assert narrow["resident_bytes"] < 0.6 * own["resident_bytes"] == 0.6 * autocast["resident_bytes"]
    assert narrow["bytes"] == own["bytes"] / 2
    assert own["peak_bytes"] > 4 * 24 * 64  # a hidden state, fp32
    assert [each["product"] for each in (own, narrow)] == ["fp32 product", "bf16 product"]
    assert "speed" not in int8
    assert int8["product"] == "emulated here: no speed"
    assert len(int8["output_errors"]) == 28  # measured beside a scheme that calibrates
    assert 0 < autocast["kl"]["mean"] < 1e-3
    assert "memory: loaded, and at most added by a pass; energy:" in capsys.readouterr().out
    page = (run / "compare.html").read_text()
    assert all(f'<figure id="{name}">' in page for name in ("kl", "change", "errors", "speed"))
    assert "int8-a8s" in page
    (run / "compare.html").write_text("mine")
    assert main(["compare", str(run), *argv]) == 2
    assert "would be replaced" in four_parts(capsys.readouterr().err, "compare.out")


def test_as_trained_is_what_training_evaluated(data: Path, run_dir: Path, capsys) -> None:
    options = {"precision": "fp8_tensorwise", "precision__rules": "[{match: '*.down_proj', compute: high}]"}
    varied = {"model__config__initializer_range": 0.2, "train__eval_every": 2, "train__eval_rows": 8}
    finished(1, arguments(run_dir, data, train__steps=2, **options, **varied))
    assert main(["export", str(run_dir)]) == 0
    [found] = result_of(run_dir, "compare.as_trained=true")["candidates"]
    assert found["name"] == "as trained, bf16_mixed fp8_tensorwise"
    said = float(str(rows(run_dir)[-1]["eval_loss"]))
    assert found["loss"] == pytest.approx(said, rel=2e-5)
    served = json.loads((run_dir / "compare.json").read_text())["reference"]["loss"]
    assert abs(served - said) > 20 * abs(found["loss"] - said)
    assert main(["compare", str(run_dir / "export"), f"run.dir={run_dir}", "compare.as_trained=true"]) == 2
    assert "is no run" in four_parts(capsys.readouterr().err, "compare.as_trained")


def test_formats_that_adapted_are_those_of_the_exported_step(trained, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained.run, tmp_path / "run"))
    config = compose.read_run(run / "config.yaml")
    config.precision.compute, config.precision.adaptive = "fp8_tensorwise", True
    config.precision.ladder, config.precision.high_first = ["fp8_tensorwise", "bf16", "high"], 1
    (run / "config.yaml").write_text(compose.to_yaml(config))
    precision = of_training.check(run, str(run))
    source = Source(str(run / "export"), trust_remote_code=False, field="compare.sources")
    paths = [linear.path for linear in source.linears if linear.layer > 0]
    states = {"version": 1, "layers": {paths[0]: ["bf16", 0, 0, 20], paths[1]: ["high", 0, 0, 20]}}
    step = run / "checkpoints" / "step-00000002"
    aside = step.rename(tmp_path / "aside")
    with pytest.raises(UserError) as caught:
        of_training.AsTrained(run, source, precision)
    assert "checkpoint of step 2, which is not there" in four_parts(str(caught.value), "compare.as_trained")
    aside.rename(step)
    progress = Progress(2, 256, {}, {"adaptive": states})
    marker.write(step, progress=progress, files=marker.read(step))
    found = of_training.AsTrained(run, source, precision).formats
    assert found == {paths[0]: "bf16", **dict.fromkeys(paths[2:], "fp8_tensorwise")}


def test_without_matplotlib_there_is_no_page(trained, tmp_path: Path, capsys, monkeypatch) -> None:
    run, real = shutil.copytree(trained.run, tmp_path / "run"), importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "matplotlib" else real(name, *more)
    )
    result_of(run, "compare.dtypes=[bfloat16]", "compare.rows=2")
    assert "no page is drawn: matplotlib is not installed; pip install" in capsys.readouterr().out
    assert not (run / "compare.html").exists()


def test_kinds_of_models_that_are_refused(trained, tmp_path: Path, capsys, monkeypatch) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()

    def refused(architecture: str, *argv: str) -> str:
        fields = {"model_type": "bert", "architectures": [architecture]}
        (folder / "config.json").write_text(json.dumps(fields))
        assert main(["compare", str(folder), f"run.dir={trained.run}", *argv]) == 2
        return four_parts(capsys.readouterr().err, "compare.sources")

    argv = ["compare.dtypes=[bfloat16]", "compare.speed=8"]
    assert "it finds the ends of answers" in refused("BertForQuestionAnswering", *argv)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # so that lm_eval is there
    assert "it is no causal language model" in refused("BertForMaskedLM", *argv, "lm_eval.tasks=[piqa]")


def test_what_is_refused_before_a_model_is_loaded(trained, tmp_path: Path, capsys) -> None:
    for argv, field, words in (
        (["compare.speed=32", "compare.dtypes=[bfloat16]"], "compare.speed", "a row has 32 tokens"),
        (["compare.as_trained=true"], "compare.as_trained", "multiplied in precision.kind=fp32"),
        (["compare.dtypes=[autocast]"], "compare.dtypes", "autocast_bf16"),
        (["compare.dtypes=[bfloat16]", "compare.out=x.html"], "compare.out", "the page has this name"),
    ):
        assert main(["compare", str(trained.run), *argv]) == 2
        assert words in four_parts(capsys.readouterr().err, field)
    half = tmp_path / "half"
    assert main(["export", str(trained.run), f"export.out={half}", "export.dtype=bfloat16"]) == 0
    assert main(["compare", str(half), f"run.dir={trained.run}", "compare.dtypes=[autocast_bf16]"]) == 2
    assert "has weights in bf16" in four_parts(capsys.readouterr().err, "compare.dtypes")


def test_a_quantised_folder_is_loaded_without_bars_and_as_it_computes(tmp_path: Path, capfd) -> None:
    pytest.importorskip("compressed_tensors", reason="not installed: pip install 'hybridtrain[quantize]'")
    source, out = write(tmp_path / "source", "llama"), tmp_path / "out"
    argv = [f"run.dir={tmp_path / 'none'}", f"quantize.source={source}", "quantize.scheme=int4-g32"]
    assert main(["quantize", *argv, f"quantize.out={out}"]) == 0
    capfd.readouterr()
    found = candidates.loaded("", str(out), trust_remote_code=False)
    model = found.model
    assert "quantiz" not in (said := capfd.readouterr().err), said
    assert "ompress" not in said
    assert "Dispatching" not in said
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert str(layer.weight.dtype) == "torch.bfloat16"
    assert found.product == "dequantised when loaded, bf16 product: only the files are smaller"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert found.bytes == index["metadata"]["total_size"] < 0.6 * speed.resident_bytes(model)
