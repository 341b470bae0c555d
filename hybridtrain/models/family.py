"""The Family record: what tensor parallelism needs to know of an architecture; and the table of families.

Every family has the structure embed -> layers -> norm -> head. Paths are those of Hugging Face's model.
A new family is one file with a FAMILY record and a row in `_table`.
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
    """(config, layer index) -> sliding-window length of that layer; None: full attention."""
    tp_plan: Mapping[str, str]
    """Module path inside a layer -> style in parallel/slicing.py: Hugging Face's own plan plus the norms."""
    kv_projections: tuple[str, ...]
    """Paths inside a layer whose outputs are repeated if tp exceeds the number of key/value heads."""
    attention: str
    """Path of the attention module inside a layer."""
    initial: Callable[[Any, str], float | None]
    """(config, parameter name) -> standard deviation of its normal distribution; None: ones for
    norms, zeros for biases."""


SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
"""Model types in the table."""


def family_of(model_type: str) -> Family:
    """The family of a model type. Raises UserError if it is not supported."""
    table = _table()
    if model_type not in table:
        raise UserError(
            f"model.config.model_type={model_type}: not supported yet; supported: {', '.join(table)}"
        )
    return table[model_type]


def family_for(config: Any) -> Family:
    """The family of a transformers config, with the head of a classifier if it is one."""
    family = family_of(config.model_type)
    return replace(family, head=classifier.HEAD) if classifier.is_classifier(config.architectures) else family


def _table() -> dict[str, Family]:
    from hybridtrain.models import llama, mistral, qwen2, qwen3

    return {
        family.model_type: family for family in (llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY)
    }
