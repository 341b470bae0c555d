"""What planning knows of the adapters of a run: their sizes; needs torch."""

from __future__ import annotations

import functools
import json
import math

from hybridtrain.config.schema import AdaptersConfig, Config, ModelConfig
from hybridtrain.models import adapters
from hybridtrain.models.build import hf_config
from hybridtrain.models.source import read_config


def sizes(config: Config) -> tuple[int, ...]:
    """Parameters of adapters in each layer. Raises UserError for patterns that match no linear layer."""
    model, settings = config.model, config.adapters
    fields = json.dumps([read_config(model), model.config], sort_keys=True)
    return _sizes(fields, model.attention, json.dumps([settings.rank, settings.match]))


@functools.lru_cache(maxsize=8)
def _sizes(fields: str, attention: str, settings: str) -> tuple[int, ...]:
    (of_json, chosen), (rank, match) = json.loads(fields), json.loads(settings)
    config = hf_config(of_json, chosen=chosen, attention=attention)
    found = adapters.check(config, AdaptersConfig(kind="lora", rank=rank, match=match))
    result = [0] * config.get_text_config(decoder=True).num_hidden_layers
    for linear in found:
        result[linear.layer] += sum(map(math.prod, adapters.shapes([linear], rank=rank).values()))
    return tuple(result)
