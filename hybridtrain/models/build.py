"""Hugging Face configs and modules: the one place that asks transformers for a model."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hybridtrain.types import refusal

_LEGACY_FIELDS = {"rope_theta", "rope_scaling", "model_type"}  # older config.json files spell rope_parameters so


def hf_config(fields: Mapping[str, Any], *, chosen: Mapping[str, Any], attention: str) -> Any:
    """A transformers config from config.json `fields`; those the user chose (`chosen`) must exist in it. Raises UserError."""
    from transformers import AutoConfig

    rest = {key: value for key, value in fields.items() if key not in ("model_type", "architectures", "torch_dtype", "dtype", "transformers_version")}
    try:
        config = AutoConfig.for_model(fields["model_type"], **rest)
    except Exception as error:  # transformers validates with several libraries, each with its own exception
        reason = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise refusal(
            "model.config", dict(rest), "; ".join(reason[:3]), allowed="what this architecture's config.json takes", instead="the published values"
        ) from error
    known = set(type(config)().to_dict()) | _LEGACY_FIELDS
    for key in chosen:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            raise refusal(
                f"model.config.{key}",
                chosen[key],
                f"a {fields['model_type']} config has no such field",
                allowed="the fields of its config.json",
                instead=nearest[0] if nearest else "leave it out",
            )
    config._attn_implementation = attention
    config.use_cache = False
    return config


def meta_model(config: Any) -> nn.Module:
    """The causal LM of `config` on the meta device: structure without memory."""
    with torch.device("meta"):
        return plain_model(config)


def plain_model(config: Any) -> nn.Module:
    """Hugging Face's own causal LM of `config`, fp32, training mode, on torch's current default device."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, attn_implementation=config._attn_implementation).to(torch.float32).train()


def save_config(config: Any, folder: Path) -> None:
    """Write config.json and generation_config.json, as an export needs them."""
    from transformers import GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = copy.deepcopy(config)
    config.use_cache = True
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
