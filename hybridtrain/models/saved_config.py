"""config.json and generation_config.json of an export."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from hybridtrain.config.schema import ModelConfig
from hybridtrain.errors import UserError
from hybridtrain.models import classifier, encoder, tokens
from hybridtrain.runtime.files import read_object, write_json


def save_config(config: Any, folder: Path, *, model: ModelConfig) -> None:
    """Write config.json and generation_config.json for exports; the latter is that of model.from_pretrained
    if it has one.

    An existing generation_config.json from a hub repository, or from a folder that is gone, is kept.
    """
    from transformers import GenerationConfig

    config = _as_saved(config)
    config.save_pretrained(folder)
    generation = None
    if model.from_pretrained and not Path(model.from_pretrained).is_dir():
        with suppress(UserError):
            generation = read_object(folder / tokens.GENERATION, field="run.dir")
    if generation is None:
        generation = tokens.source_generation(model)
    if generation is None:
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    else:
        write_json(folder / tokens.GENERATION, generation)


def saved_fields(config: Any) -> dict[str, Any]:
    """The fields of config.json that `save_config` writes."""
    return json.loads(_as_saved(config).to_json_string())


def _as_saved(config: Any) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = copy.deepcopy(config)
    config.use_cache = True
    if not (classifier.is_classifier(config.architectures) or encoder.predicts(config)):
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    return config
