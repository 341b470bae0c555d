"""Linear layers that have one scheme together.

Serving engines multiply layers that read the same input as one: q, k and v; gate and up. transformers reads
the experts of all layers in one scheme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hybridtrain.models.linears import Linear
from hybridtrain.models.tracing import hooked
from hybridtrain.quantize.experts import Part
from hybridtrain.quantize.measure import predicted
from hybridtrain.quantize.walk import Quantised
from hybridtrain.types import Batch


def sets(model: Any, linears: Sequence[Linear], row: Batch, *, joined: bool) -> list[list[str]]:
    """Paths of the linear layers of a plain model, those of one scheme together: experts, and if `joined`
    those of a module that read the same tensor on a batch.
    """
    read: dict[str, Tensor] = {}  # kept: another tensor could have the place of one that is gone
    others = [linear for linear in linears if not isinstance(linear, Part)]
    if joined:
        handles = [
            model.get_submodule(linear.path).register_forward_pre_hook(
                lambda _, given, path=linear.path: read.update({path: given[0]})
            )
            for linear in others
        ]
        with hooked(*handles):
            list(predicted(model, [row]))
    found: dict[Any, list[str]] = {}
    for linear in linears:
        place: Any = linear.path
        if isinstance(linear, Part):
            place = Part
        elif linear.path in read:
            place = (linear.path.rpartition(".")[0], id(read[linear.path]))
        found.setdefault(place, []).append(linear.path)
    return list(found.values())


def candidates(
    uniform: Sequence[Mapping[str, Quantised]], together: Sequence[Sequence[str]]
) -> dict[str, list[list[Quantised]]]:
    """First path of a set -> its layers in each scheme. `uniform`: the model in each scheme, by path."""
    return {paths[0]: [[layers[path] for path in paths] for layers in uniform] for paths in together}
