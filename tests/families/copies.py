"""Reduced copies of model types, as config.json fields."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hybridtrain.analysis import analyse
from hybridtrain.models.build import saved_buffers
from hybridtrain.models.reduced import is_random, reduced

NO_DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout", "dropout")
EIGHT: dict[str, dict[str, Any]] = {
    "gemma2": {},  # two types of layers, soft caps, norms around blocks
    "gpt2": dict.fromkeys(NO_DROPOUT[:4], 0.0),  # Conv1D, learned positions, tied
    "granite": {  # multipliers other than 1
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.0156,
    },
    "olmo2": {},  # norms over all heads together
    "phi3": {},  # fused projections
    "bloom": {"n_layer": 4},  # layers that return tuples, alibi
    "mixtral": {},  # experts
    "gpt_oss": {},  # experts, sinks, windows
}
"""Model types that between them have what is easily missed -> fields other than their defaults."""


def config_of(model_type: str, **fields: Any) -> Any:
    """A transformers config of a model type as it is published, but for dropout."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type](**{**EIGHT.get(model_type, {}), **fields})
    config._attn_implementation = "sdpa"
    for each in (config, config.get_text_config(decoder=True)):
        for name, value in list(vars(each).items()):
            if is_random(name, value):
                setattr(each, name, 0.0)
    return config


def fields_of(model_type: str, **fields: Any) -> dict[str, Any]:
    """config.json fields of its reduced copy, in which initial weights are large enough to be seen."""
    return _with_large_weights(own_fields_of(model_type, **fields))


def own_fields_of(model_type: str, **fields: Any) -> dict[str, Any]:
    """config.json fields of its reduced copy."""
    small = reduced(config_of(model_type, **fields), random=False, tp=1).to_dict()
    return {**small, "model_type": model_type}


def _with_large_weights(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: 0.1
        if key == "initializer_range"
        else _with_large_weights(value)
        if key.endswith("config") and isinstance(value, Mapping)
        else value
        for key, value in fields.items()
    }


def folder_of(model_type: str, folder: Path, **fields: Any) -> dict[str, torch.Tensor]:
    """Save a reduced copy of it as transformers does, with a vocabulary of 300 tokens and saved buffers other
    than those of a new model; returns what is saved."""
    config = config_of(model_type, **fields)
    small = reduced(config, random=False, tp=1)
    for name in ("vocab_size", "vocab_size_per_layer_input"):
        if hasattr(small, name):
            setattr(small, name, 300)
    if hasattr(small, "kinds_of_layers"):
        del small.kinds_of_layers
    model = analyse.perturbed(small, config).model
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.1)
        for buffer in saved_buffers(model).values():
            if buffer.is_floating_point():
                buffer.add_(torch.rand(buffer.shape, generator=random), alpha=0.5)
            else:
                buffer.add_(1)
    model.save_pretrained(folder)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
