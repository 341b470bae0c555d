"""Parameters that transformers has under two names have one here, and are stored as transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from hybridtrain.models import build, conversion, weights
from hybridtrain.models.reduced import reduced
from tests.families.copies import config_of


def read(tensor: weights.Stored) -> torch.Tensor:
    with safe_open(tensor.file, framework="pt") as file:
        return file.get_tensor(tensor.name)


@pytest.mark.parametrize("model_type", ["bert", "xlm-roberta"])
def test_a_bias_that_is_stored_under_another_name_is_read_and_written(
    model_type: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    config = reduced(config_of(model_type, is_decoder=True), random=False, tp=1)
    own = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(own.get_output_embeddings().bias)
    own.save_pretrained(tmp_path)
    expected, stored = dict(own.named_parameters(remove_duplicate=False)), weights.stored(tmp_path)
    model: Any = build.meta_model(config)
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == sum(1 for _ in own.parameters())
    assert any(name.endswith("decoder.bias") for name in names)
    read_all: Any = conversion.as_parameters(model, stored, read=read)
    found = {name: read(tensor) for name, tensor in read_all.items()}
    assert found.keys() == set(names)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert conversion.as_stored(model, found).keys() == stored.keys()
