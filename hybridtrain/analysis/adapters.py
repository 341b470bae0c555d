"""What planning knows of the adapters of a run: their sizes; needs torch."""

from __future__ import annotations

import math

from hybridtrain.config.schema import Config
from hybridtrain.models import adapters
from hybridtrain.models.build import hf_config
from hybridtrain.models.source import read_config

_FOUND: dict[str, tuple[int, ...]] = {}
"""Results of this process by what they follow from: one start asks several times."""


def sizes(config: Config) -> tuple[int, ...]:
    """Parameters of adapters in each layer. Raises UserError for patterns that match no linear layer."""
    settings, fields = config.adapters, read_config(config.model)
    key = repr((sorted(fields.items()), settings.rank, settings.match))
    if key not in _FOUND:
        built = hf_config(fields, chosen={}, attention=config.model.attention)
        found = [0] * built.get_text_config(decoder=True).num_hidden_layers
        for linear in adapters.check(built, settings):
            found[linear.layer] += sum(map(math.prod, adapters.shapes([linear], rank=settings.rank).values()))
        _FOUND[key] = tuple(found)
    return _FOUND[key]
