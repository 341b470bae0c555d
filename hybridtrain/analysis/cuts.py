"""Where a model can be cut into pipeline stages, at its real number of layers.

The reduced copy of analyse.py has few layers, so that it does not show what depends on a layer's number:
layers that use the keys and values of one long before them, or the sum of every sixth. Here the copy has all
layers, and is small in everything else.
"""

from __future__ import annotations

import copy
from typing import Any

from hybridtrain.analysis import analyse
from hybridtrain.models.reduced import FFN, reduced
from hybridtrain.models.structure import structure_of


def allowed(config: Any, *, holds: bool) -> tuple[int, ...] | None:
    """Layers at which a stage may begin; None: every layer.

    `holds`: the reduced copy can be cut everywhere. This is enough if layers take nothing but hidden states
    that layers compute (Structure.chained).
    """
    if holds and structure_of(config).chained:
        return None
    if not holds and not _any(analyse.copy_of(config)):
        return ()
    whole, count = deep(config), _layers(config)
    if _layers(whole.config) != count:  # a config that does not let it have all layers
        return ()
    passes = analyse.comparison(whole)
    if passes(range(1, count)):
        return None
    found = tuple(cut for cut in range(1, count) if passes([cut]))
    return found if passes(found) else ()


def _any(small: analyse.Copy) -> bool:
    """Whether a reduced copy can be cut at all."""
    passes = analyse.comparison(small)
    return any(passes([cut]) for cut in range(1, _layers(small.config)))


def deep(config: Any) -> analyse.Copy:
    """A reduced copy with all layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    # A reduced copy keeps one layer of each type: with a field of its own value, each is a type.
    text.layer_numbers = list(range(_layers(config)))
    if isinstance(getattr(text, "intermediate_size", None), list):
        text.intermediate_size = [FFN] * _layers(config)
    return analyse.perturbed(reduced(config, random=False), config)


def _layers(config: Any) -> int:
    return config.get_text_config(decoder=True).num_hidden_layers
