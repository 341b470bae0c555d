"""What planning knows of the adapters of a run: their sizes, and that the model calls their linear layers;
needs torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from hybridtrain.analysis import analyse
from hybridtrain.config.schema import AdaptersConfig, Config
from hybridtrain.errors import refusal
from hybridtrain.models import adapters, plain, quantised
from hybridtrain.models.build import hf_config
from hybridtrain.models.linears import Linear, linears_of
from hybridtrain.models.source import read_config
from hybridtrain.models.structure import structure_of
from hybridtrain.types import Quantised

_FOUND: dict[str, Sizes] = {}
"""Results of this process by what they follow from: one start asks several times."""


@dataclass(frozen=True)
class Sizes:
    """Fields of ModelFacts."""

    adapters: tuple[int, ...]
    adapter_values: int
    quantised: tuple[Quantised, ...]
    row_blocks: int


def sizes(config: Config) -> Sizes:
    """Adapters and frozen weights in codes, of each layer. Raises UserError for patterns that match no linear
    layer, layers that the model does not call, and weights that cannot be stored in codes.
    """
    settings, fields = config.adapters, read_config(config.model)
    key = repr((sorted(fields.items()), settings))
    if key not in _FOUND:
        built = hf_config(fields, chosen={}, attention=config.model.attention)
        linears = adapters.check(built, settings)
        adapters.check_saved(built, settings, linears)
        if built.model_type not in plain.TYPES:
            _check_called(linears, built, settings)
        layers = range(built.get_text_config(decoder=True).num_hidden_layers)
        of_layers = [[linear for linear in linears if linear.layer == layer] for layer in layers]
        kind = settings.base_format
        blocks = [linear.inputs // quantised.BLOCK for linear in linears if kind == "nf4"]
        _FOUND[key] = Sizes(
            tuple(
                sum(map(math.prod, (adapters.shapes(each, settings) | whole).values()))
                for each, whole in zip(of_layers, _whole(built, settings, layers), strict=True)
            ),
            max(adapters.values_kept(each, settings) for each in of_layers),
            tuple(quantised.sizes(each, kind) for each in of_layers) if kind != "none" else (),
            math.gcd(*blocks),
        )
    return _FOUND[key]


def _whole(config: Any, settings: AdaptersConfig, layers: range) -> list[dict[str, torch.Size]]:
    """Of each layer, the parameters of modules that are trained whole; of the last also those outside."""
    found: list[dict[str, torch.Size]] = [{} for _ in layers]
    prefix = f"{structure_of(config).layers}."
    for name, shape in adapters.saved(config, settings).items():
        number = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else ""
        found[int(number) if number else -1][name] = shape
    return found


def _check_called(linears: Sequence[Linear], config: Any, settings: AdaptersConfig) -> None:
    """Refuse adapters of layers whose weight the model reads without calling them, as found on a reduced
    copy: they would not act. And dropout where a layer is called with other than rows of positions.
    """
    copy = analyse.copy_of(config, tp=1)
    called: dict[str, torch.Size] = {}

    def note(_: Any, given: tuple[torch.Tensor, ...], __: Any, *, path: str) -> None:
        called[_kind(path)] = given[0].shape

    for linear in linears_of(copy.config):
        copy.model.get_submodule(linear.path).register_forward_hook(partial(note, path=linear.path))
    ids = analyse.tokens(length=analyse.LENGTH)
    with torch.no_grad():
        analyse.logits(copy, ids)  # with its dropout
    of_copy = {_kind(linear.path) for linear in linears_of(copy.config)}
    chosen = dict.fromkeys(_kind(linear.path) for linear in linears)
    idle = [kind for kind in chosen if kind in of_copy - called.keys()]
    flat = [kind for kind in chosen if kind in called and called[kind][:2] != ids.shape]
    flat = flat if settings.dropout else []
    rest = [f"*.{kind.rpartition('.*.')[2]}" for kind in chosen if kind not in idle + flat]
    if flat:
        raise refusal(
            "adapters.dropout",
            settings.dropout,
            f"a {config.model_type} model calls {flat[0]} without rows and positions, of which dropout is a "
            "function",
            allowed="0 with this layer",
            instead="adapters.dropout=0" + (f", or {adapters.FIELD}={rest}" if rest else ""),
        )
    if idle:
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
