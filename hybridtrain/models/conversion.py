"""The weights of Hugging Face folders under the names of a model's parameters, and back.

Most architectures are stored as they are built. For the others transformers has conversions, which it applies
to whole models: experts stored one by one that the model has in one parameter, other prefixes. Here they are
applied to one parameter, or one layer, at a time. Only this file uses them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hybridtrain.models import names
from hybridtrain.models.weights import Stored


@dataclass(frozen=True)
class Converted:
    """A parameter that is made of tensors in the files."""

    shape: tuple[int, ...]
    dtype: str
    value: Callable[[], Tensor]


def as_parameters(
    model: Any, tensors: Mapping[str, Stored], *, read: Callable[[Stored], Tensor]
) -> dict[str, Stored | Converted]:
    """The tensors of a folder by the names of the parameters of `model` (on meta) that they become.

    `read` reads a whole tensor. The last converted parameters are kept: a conversion may make several.
    """
    from transformers.core_model_loading import dot_natural_key

    rename, conversions = _rules(model)
    sources: dict[str, list[tuple[str, str | None]]] = {}
    for key in sorted(tensors, key=dot_natural_key):
        name, pattern = rename(key)
        sources.setdefault(name, []).append((key, pattern))
    result: dict[str, Stored | Converted] = {}
    last: dict[str, dict[str, Tensor]] = {}
    for name, keys in sources.items():
        if keys[0][1] is None:
            result[name] = tensors[keys[0][0]]
            continue

        made = _Made(name, keys, conversions[keys[0][1]], model, tensors)
        for each, empty in made.values(lambda stored: torch.empty(stored.shape, device="meta")).items():
            value = partial(_value, each, made=made, read=read, last=last)
            result[each] = Converted(tuple(empty.shape), tensors[keys[0][0]].dtype, value)
    for name, other in names.stored(model).items():
        if other in result:
            result[name] = result.pop(other)
    return result


@dataclass(frozen=True)
class _Made:
    """Parameters that one conversion makes."""

    name: str
    keys: Sequence[tuple[str, str | None]]
    """(name in the files, pattern of the conversion)."""
    conversion: Any
    model: Any
    tensors: Mapping[str, Stored]

    def values(self, read: Callable[[Stored], Tensor]) -> dict[str, Tensor]:
        """Name -> parameter, from what `read` returns for each tensor."""
        conversion = copy.deepcopy(self.conversion)
        for key, pattern in self.keys:
            conversion.add_tensor(self.name, key, pattern, read(self.tensors[key]))
        made = conversion.convert(self.name, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _value(
    name: str, *, made: _Made, read: Callable[[Stored], Tensor], last: dict[str, dict[str, Tensor]]
) -> Tensor:
    if made.name not in last:
        last.clear()
        last[made.name] = made.values(read)
    return last[made.name][name]


def _rules(model: Any) -> tuple[Callable[[str], tuple[str, str | None]], dict[str, Any]]:
    """(name in a file -> name of the parameter, and the conversion's pattern that it matches; pattern ->
    conversion).
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state = model.state_dict()

    def rename(key: str) -> tuple[str, str | None]:
        return rename_source_key(key, renamings, converters, model.base_model_prefix, state)

    return rename, {pattern: each for each in converters for pattern in each.source_patterns}


def as_stored(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of one layer, or of all that is in no layer, as transformers stores them."""
    from transformers.core_model_loading import revert_weight_conversion

    stored = names.stored(model)
    renamed = {stored.get(name, name): value for name, value in parameters.items()}
    return revert_weight_conversion(model, renamed)  # type: ignore[arg-type]
