"""What planning knows of the adapters of a run: their sizes, and that the model calls their linear layers;
needs torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hybridtrain.analysis import analyse
from hybridtrain.config.schema import Config
from hybridtrain.errors import refusal
from hybridtrain.models import adapters, plain, quantised
from hybridtrain.models.build import hf_config
from hybridtrain.models.linears import Linear, linears_of
from hybridtrain.models.source import read_config
from hybridtrain.types import Quantised

_FOUND: dict[str, Sizes] = {}
"""Results of this process by what they follow from: one start asks several times."""


@dataclass(frozen=True)
class Sizes:
    """Fields of ModelFacts."""

    adapters: tuple[int, ...]
    quantised: tuple[Quantised, ...]
    row_blocks: int


def sizes(config: Config) -> Sizes:
    """Adapters and frozen weights in codes, of each layer. Raises UserError for patterns that match no linear
    layer, layers that the model does not call, and weights that cannot be stored in codes.
    """
    settings, fields = config.adapters, read_config(config.model)
    key = repr((sorted(fields.items()), settings.rank, settings.match, settings.base_format))
    if key not in _FOUND:
        built = hf_config(fields, chosen={}, attention=config.model.attention)
        linears = adapters.check(built, settings)
        if built.model_type not in plain.TYPES:
            _check_called(linears, built)
        layers = range(built.get_text_config(decoder=True).num_hidden_layers)
        of_layers = [[linear for linear in linears if linear.layer == layer] for layer in layers]
        kind, rank = settings.base_format, settings.rank
        blocks = [linear.inputs // quantised.BLOCK for linear in linears if kind == "nf4"]
        _FOUND[key] = Sizes(
            tuple(sum(map(math.prod, adapters.shapes(each, rank=rank).values())) for each in of_layers),
            tuple(quantised.sizes(each, kind) for each in of_layers) if kind != "none" else (),
            math.gcd(*blocks),
        )
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
