"""The parameters of a model, from its config alone: their names and shapes, and what patterns match."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hybridtrain.config.schema import AdaptersConfig, Config
from hybridtrain.models import adapters, patterns, plain
from hybridtrain.models.build import hf_config, meta_model, one_layer
from hybridtrain.models.source import read_config
from hybridtrain.plan import optimizer_states


def check(config: Config) -> None:
    """Check that the chosen model fields take effect and that patterns match parameters; needs no weights.

    Raises UserError.
    """
    built = hf_config(read_config(config.model), chosen=config.model.config, attention=config.model.attention)
    freeze, settings = config.model.freeze, config.adapters
    names = parameter_names(built)
    if settings.kind != "none":
        names += adapters.shapes(adapters.check(built, settings), settings)
    patterns.check(names, freeze=freeze, optim=config.optim, adapters=settings)
    if config.precision.state == "8bit":
        optimizer_states.check_rows(trained_shapes(built, freeze=freeze, settings=settings))


def trained_shapes(config: Any, *, freeze: Sequence[str], settings: AdaptersConfig) -> dict[str, torch.Size]:
    """Name -> whole shape of the parameters that are trained, tied ones once."""
    if settings.kind != "none":
        added = adapters.shapes(adapters.chosen(config, settings), settings)
        return adapters.saved(config, settings) | added
    return {
        name: parameter.shape
        for name, parameter in meta_model(config).named_parameters()
        if parameter.requires_grad and not patterns.matches(name, freeze)
    }


def parameter_names(config: Any) -> list[str]:
    """Names of all parameters of the model, tied ones once.

    Built from one layer, where all layers have the same parameters.
    """
    if config.model_type not in plain.TYPES:
        return [name for name, _ in meta_model(config).named_parameters()]
    prefix = f"{plain.LAYERS}.0."
    found: list[str] = []
    for name, _ in one_layer(config).named_parameters():
        found += (
            [
                f"{plain.LAYERS}.{index}.{name.removeprefix(prefix)}"
                for index in range(config.num_hidden_layers)
            ]
            if name.startswith(prefix)
            else [name]
        )
    return found
