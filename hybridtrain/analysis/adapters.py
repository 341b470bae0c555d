"""What planning knows of the adapters of a run: their sizes, and that the model calls their linear layers;
needs torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch

from hybridtrain.analysis import analyse
from hybridtrain.config.schema import Config
from hybridtrain.errors import refusal
from hybridtrain.models import adapters, plain
from hybridtrain.models.build import hf_config
from hybridtrain.models.linears import Linear, linears_of
from hybridtrain.models.source import read_config

_FOUND: dict[str, tuple[int, ...]] = {}
"""Results of this process by what they follow from: one start asks several times."""


def sizes(config: Config) -> tuple[int, ...]:
    """Parameters of adapters in each layer. Raises UserError for patterns that match no linear layer, and
    layers that the model does not call.
    """
    settings, fields = config.adapters, read_config(config.model)
    key = repr((sorted(fields.items()), settings.rank, settings.match))
    if key not in _FOUND:
        built = hf_config(fields, chosen={}, attention=config.model.attention)
        linears = adapters.check(built, settings)
        if built.model_type not in plain.TYPES:
            _check_called(linears, built)
        found = [0] * built.get_text_config(decoder=True).num_hidden_layers
        for linear in linears:
            found[linear.layer] += sum(map(math.prod, adapters.shapes([linear], rank=settings.rank).values()))
        _FOUND[key] = tuple(found)
    return _FOUND[key]


def _check_called(linears: Sequence[Linear], config: Any) -> None:
    """Refuse adapters of layers whose weight the model reads without calling them, as found on a reduced
    copy: they would not act.
    """
    copy = analyse.copy_of(config, tp=1)
    called: set[str] = set()
    for linear in linears_of(copy.config):
        module = copy.model.get_submodule(linear.path)
        module.register_forward_hook(lambda *_, path=linear.path: called.add(_kind(path)))
    with torch.no_grad():
        copy.model(input_ids=analyse.tokens(length=analyse.LENGTH))
    of_copy = {_kind(linear.path) for linear in linears_of(copy.config)}
    chosen = dict.fromkeys(_kind(linear.path) for linear in linears)
    if idle := [kind for kind in chosen if kind in of_copy - called]:
        rest = [f"*.{kind.rpartition('.*.')[2]}" for kind in chosen if kind not in idle]
        raise refusal(
            adapters.FIELD,
            "[]" if len(chosen) > len(idle) else idle,
            f"a {config.model_type} model reads the weight of {idle[0]} without calling that layer, so that "
            "an adapter would not act",
            allowed="linear layers that the model calls",
            instead=f"{adapters.FIELD}={rest}" if rest else "other layers",
        )


def _kind(path: str) -> str:
    return re.sub(r"\b\d+\b", "*", path)
