"""Hugging Face's own model with dropout of keyed rows, as the stages of training have it."""

from __future__ import annotations

from typing import Any

from hybridtrain.config.schema import AdaptersConfig
from hybridtrain.models import attention, dropout
from hybridtrain.models.dropout import Dropouts
from hybridtrain.models.structure import structure_of


def keyed(model: Any, config: Any, *, adapters: AdaptersConfig) -> Dropouts:
    """Let transformers' plain model of a config, with its adapters, drop by the keys of rows, in place."""
    if dropout.rates(config):
        attention.use_keyed(model)
    layers, adapted = structure_of(config).layers, adapters.dropout > 0
    return dropout.install(model, config=config, layers=layers, adapted=adapted)
