"""What is random in a model's forward pass in training: dropout by the keys of rows (models/dropout.py) is
the same under every layout; whatever draws random numbers itself is not, and is refused by the fields that
ask for it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hybridtrain.analysis import analyse
from hybridtrain.analysis.facts import in_kernel
from hybridtrain.errors import refusal
from hybridtrain.models import dropout
from hybridtrain.models.build import attention_of
from hybridtrain.models.dropout import CannotKey, Site
from hybridtrain.models.structure import OTHER, cannot_train


class _Extreme(TorchDispatchMode):
    """Random numbers are the lowest, or the highest, that could be drawn."""

    def __init__(self, *, high: bool):
        super().__init__()
        self.high = high

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in function.tags and isinstance(result, Tensor):
            uniform = function is torch.ops.aten.uniform_.default
            bounds = (*args[1:], 0.0, 1.0)[:2] if uniform else (0.0, 1.0)
            result.fill_(bounds[self.high])
        return result


def dropped(config: Any) -> dict[str, float]:
    """Modules that drop elements by the keys of rows, by their path in a layer or, outside, in the model ->
    rate. Raises UserError for a model that is random otherwise.
    """
    why, found = _examined(analyse.copied(config))
    if why:
        raise _refusal(config, why)
    return found


def _refusal(config: Any, why: str) -> Exception:
    """`why` the model's randomness depends on the layout: by the fields that ask for it."""
    fields = dropout.rates(config)
    guilty = {path: rate for path, rate in fields.items() if _examined(_copy(_only(config, path, fields)))[0]}
    if not guilty:
        return cannot_train(config.model_type, why, instead=OTHER)
    name = next(iter(guilty))
    eager = copy.deepcopy(config)
    eager._attn_implementation = "eager"
    if attention_of(config) != "eager" and not _examined(_copy(eager))[0]:
        return in_kernel(guilty)
    instead = " ".join(f"model.config.{each}=0" for each in guilty)
    return refusal(f"model.config.{name}", guilty[name], why, allowed="0", instead=instead)


def _examined(reduced_copy: analyse.Copy) -> tuple[str, dict[str, float]]:
    """(why the model's randomness depends on the layout, or ""; what `dropped` returns)."""
    found: dict[str, float] = {}
    dropout.replace_sites(reduced_copy.model, lambda path, site: _Noted(site, found))  # noqa: ARG005
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            results, ids = [], analyse.tokens(length=analyse.LENGTH)
            for high in (False, True):
                with _Extreme(high=high):
                    results.append(analyse.logits(reduced_copy, ids))
    except CannotKey as error:
        return f"dropout that is no function of row, position and channel: {error}", {}
    if torch.equal(*results):
        return "", found
    return "random numbers that the model's own code draws would differ between layouts", {}


def _copy(config: Any) -> analyse.Copy:
    return analyse.copy_of(config, tp=1)


def _only(config: Any, path: str, fields: Mapping[str, float]) -> Any:
    """A config with one of its `fields`, the others at 0."""
    changed = copy.deepcopy(config)
    for other in fields.keys() - {path}:
        *outer, name = other.split(".")
        setattr(getattr(changed, outer[0]) if outer else changed, name, type(fields[other])(0))
    return changed


class _Noted(Site):
    """A site that notes its rate."""

    def __init__(self, site: Site, found: dict[str, float]):
        super().__init__(site.path, site.slot)
        self.found = found

    def drop(self, x: Tensor, p: float) -> Tensor:
        self.found[self.path] = p
        return super().drop(x, p)
