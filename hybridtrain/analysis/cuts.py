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
from hybridtrain.models.structure import outermost, structure_of


def allowed(config: Any, *, holds: bool) -> tuple[int, ...] | None:
    """Layers at which a stage may begin; None: every layer.

    `holds`: the reduced copy can be cut everywhere. This is enough if layers take nothing but hidden states
    that layers compute (Structure.chained).
    """
    structure = structure_of(config)
    if holds and structure.chained:
        return None
    if any("?" in shape for path, shape in outermost(structure.before) if path not in structure.shared):
        return ()  # see Stage
    whole, count = deep(config), _layers(config)
    if _layers(whole.config) != count:  # a config that does not let it have all layers
        return ()
    passes = analyse.comparison(whole)
    if passes(range(1, count)):
        return None
    found = tuple(cut for cut in range(1, count) if passes([cut]))
    return found if passes(found) else ()


def deep(config: Any) -> analyse.Copy:
    """A reduced copy with all layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    # A reduced copy keeps one layer of each type: with a field of its own value, each is a type.
    text.kinds_of_layers = [str(index) for index in range(_layers(config))]
    if isinstance(getattr(text, "intermediate_size", None), list):
        text.intermediate_size = [FFN] * _layers(config)
    return analyse.perturbed(reduced(config, random=True, tp=1), config)


def _layers(config: Any) -> int:
    return config.get_text_config(decoder=True).num_hidden_layers
