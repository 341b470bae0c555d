"""Whether a reduced copy has the parameters of the model: claims that are proven on a copy with other parts
say nothing about the model.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from hybridtrain.models import build
from hybridtrain.models.structure import Structure


def problem_of(config: Any, small: Any, *, structure: Structure) -> str:
    """What is wrong with `small`, the reduced copy of the model of `config`; empty if nothing is."""
    model, count = build.meta_model(config), config.get_text_config(decoder=True).num_hidden_layers
    listed: Any = model.get_submodule(structure.layers)
    if len(listed) != count:
        return f"its config has {count} layers, and {structure.layers} {len(listed)}"
    if name := other_than_in(model, small, layers=structure.layers):
        return f"{name} is not in both the model and its reduced copy"
    if same := shared(small, structure=structure):
        return f"{same[0]} and {same[1]} are one parameter, which is not supported yet"
    return ""


def other_than_in(model: nn.Module, small: nn.Module, *, layers: str) -> str:
    """A parameter that either the model or its reduced copy lacks; empty if there is none.

    The copy has fewer layers: both have to have the same kinds of layers.
    """
    theirs, ours = (_parts(each, layers) for each in (model, small))
    if different := theirs.pop("") ^ ours.pop(""):
        return min(different)
    for one, other in ((theirs, ours), (ours, theirs)):
        kinds = list(other.values())
        for index, names in one.items():
            if names not in kinds:
                nearest = min((names ^ kind for kind in kinds), key=len)
                return f"{layers}.{index}.{min(nearest)}"
    return ""


def _parts(model: nn.Module, layers: str) -> dict[str, set[str]]:
    """Index of a layer, or "" for what is in none -> names of its parameters, with N for numbers in them."""
    found: dict[str, set[str]] = {"": set()}
    for name, _ in model.named_parameters():
        part, rest = "", name
        if name.startswith(f"{layers}."):
            part, _, rest = name.removeprefix(f"{layers}.").partition(".")
        found.setdefault(part, set()).add(re.sub(r"\b\d+\b", "N", rest))
    return found


def shared(model: nn.Module, *, structure: Structure) -> list[str]:
    """Names of one parameter, other than a head's that is tied to the embedding; empty if there is none."""
    tied = sorted([f"{structure.embed}.weight", f"{structure.head}.weight"])
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return next((same for same in names.values() if len(same) > 1 and sorted(same) != tied), [])
