"""Models whose layers take more than hidden states, and models with buffers that are saved: from a folder of
transformers through pipeline stages to an export."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybridtrain.cli import commands
from hybridtrain.config.schema import ModelConfig
from hybridtrain.models.build import hf_config
from hybridtrain.models.init import WeightSource
from hybridtrain.models.load import initial
from hybridtrain.models.source import read_config
from tests.cases import Case, assert_parity
from tests.families.copies import folder_of
from tests.runs import arguments, finished, rows

SLOW = pytest.mark.slow


def gemma3n(layers: int, *, sharing: int) -> dict[str, Any]:
    """Gemma 3n whose last `sharing` layers use keys and values of those before them."""
    kinds = [("sliding_attention", "full_attention")[index % 2] for index in range(layers)]
    per_layer = {
        "layer_types": kinds,
        "intermediate_size": [80] * layers,
        "activation_sparsity_pattern": None,
    }
    sizes = {"num_hidden_layers": layers, "num_kv_shared_layers": sharing}
    different = [str(index) for index in range(layers)]  # so that its copy keeps all layers
    return {**sizes, **per_layer, "kinds_of_layers": different}


@pytest.mark.parametrize(
    ("model_type", "fields", "layout"),
    [
        ("gemma4_text", {}, "pp2"),
        ("deepseek_v3", {}, "pp2"),
        *(
            pytest.param("gemma4_text", {}, layout, marks=SLOW)
            for layout in ("pp2-dp_shard2-zero3", "pp2-interleaved_1f1b", "pp4-gpipe")
        ),
        *(
            pytest.param("gemma3n_text", gemma3n(4, sharing=0), layout, marks=SLOW)
            for layout in ("pp2", "pp2-dp_shard2-zero3")
        ),
        pytest.param("deepseek_v3", {}, "dp_shard2-zero3", marks=SLOW),
    ],
)
def test_layouts_equal_the_plain_process(
    model_type: str, fields: dict[str, Any], layout: str, tmp_path: Path
) -> None:
    folder_of(model_type, tmp_path, **fields)
    source = (("model.from_pretrained", str(tmp_path)),)
    assert_parity(Case(layout, {"vocab_size": 300}, overrides=source))


def command(run: Path, data: Path, source: Path, **options: object) -> list[str]:
    words = arguments(run, data, model__from_pretrained=source, **options)
    return [word for word in words if not word.startswith("model=")]


@pytest.mark.parametrize("model_type", ["gemma4_text", pytest.param("deepseek_v3", marks=SLOW)])
def test_a_folder_comes_out_as_it_went_in(model_type: str, data: Path, tmp_path: Path) -> None:
    source, run = tmp_path / "source", tmp_path / "run"
    folder_of(model_type, source)
    # a rate at which no weight changes
    finished(2, command(run, data, source, optim__lr=1e-30, train__steps=1, parallel="pp2"))
    assert commands.run_command("export", [str(run), "export.dtype=float32"]) == 0
    exported, saved = (load_file(folder / "model.safetensors") for folder in (run / "export", source))
    assert exported.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(exported[name], tensor), name


@pytest.mark.slow
def test_stages_between_layers_that_share_keys_resume_as_one(data: Path, tmp_path: Path) -> None:
    """Eight layers, cut at the fourth: a cut further down would part the last two from their sources."""
    source, whole, run = (tmp_path / each for each in ("source", "whole", "run"))
    folder_of("gemma3n_text", source, **gemma3n(8, sharing=2))
    finished(1, command(whole, data, source, train__steps=4))
    finished(2, command(run, data, source, train__steps=2, parallel="pp2"))
    finished(2, command(run, data, source, train__steps=4, parallel="zero3"))
    losses = [[row["loss"] for row in rows(each)] for each in (whole, run)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def source_of(folder: Path) -> WeightSource:
    model = ModelConfig(from_pretrained=str(folder))
    return initial(model, hf_config(read_config(model), chosen={}, attention="sdpa"), seed=0)


@pytest.mark.parametrize("model_type", ["glm4_moe", "hy_v4"])
def test_saved_buffers_are_read(model_type: str, tmp_path: Path) -> None:
    held = folder_of(model_type, tmp_path)
    source = source_of(tmp_path)
    buffers = {name: tensor for name, tensor in held.items() if name.endswith("e_score_correction_bias")}
    assert buffers
    assert all(float(tensor.min()) > 0 for tensor in buffers.values())
    for name, tensor in buffers.items():
        shape = tuple(tensor.shape)
        assert torch.equal(source(name, shape, tuple(slice(0, size) for size in shape)), tensor), name


def test_saved_buffers_that_are_not_in_a_folder_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder_of("glm4_moe", tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors = load_file(file)
    [size] = tensors.pop(name).shape
    save_file(tensors, file, {"format": "pt"})
    with caplog.at_level(logging.INFO, logger="hybridtrain"):
        source = source_of(tmp_path)
    assert f"{name}: not in the files, as in a new model" in caplog.text
    assert torch.equal(source(name, (size,), (slice(0, size),)), torch.zeros(size))
    tensors[name] = torch.zeros(size + 1)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(Exception, match=rf"'{name}' has shape \({size + 1},\), the config needs \({size},\)"):
        source_of(tmp_path)
