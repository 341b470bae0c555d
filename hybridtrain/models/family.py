"""The Family record: all that parallelism needs to know of an architecture, and the table of supported ones.

Every family here is embed -> layers -> norm -> head. Paths are Hugging Face's own, so that names survive any cut.
A new family is one file with a FAMILY record, one row in `_table` and one in facts.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hybridtrain.errors import UserError
from hybridtrain.models import classifier


@dataclass(frozen=True)
class Family:
    model_type: str
    embed: str
    layers: str
    norm: str
    head: str
    rotary: str
    window: Callable[[Any, int], int | None]
    """(config, layer index) -> sliding-window length of that layer, None for full attention."""
    tp_plan: Mapping[str, str]
    """Module path inside a layer -> style name of parallel/tensor.py; Hugging Face's own plan plus the norms."""
    kv_projections: tuple[str, ...]
    """Paths inside a layer whose outputs are repeated when tp exceeds the number of key/value heads."""
    attention: str
    """Path of the attention module inside a layer."""
    initial: Callable[[Any, str], float | None]
    """(config, parameter name) -> standard deviation of the normal it is drawn from; None: ones for norms, zeros for biases."""


def family_of(model_type: str) -> Family:
    """Look up a family; raises UserError naming the supported ones."""
    table = _table()
    if model_type not in table:
        raise UserError(f"model.config.model_type={model_type}: not supported yet; supported: {', '.join(table)}")
    return table[model_type]


def family_for(config: Any) -> Family:
    """The family of transformers' `config`; a classifier's head has its own name."""
    family = family_of(config.model_type)
    return replace(family, head=classifier.HEAD) if classifier.is_classifier(config.architectures) else family


def _table() -> dict[str, Family]:
    from hybridtrain.models import llama, mistral, qwen2, qwen3

    return {family.model_type: family for family in (llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY)}
