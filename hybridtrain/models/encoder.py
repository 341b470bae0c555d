"""Encoders, whose tokens see those that follow them: BERT, RoBERTa and their like. No torch.

In config.json, `architectures` marks one, and names what it predicts:

    ...ForMaskedLM       the tokens that are masked
    ...ForPreTraining    these, and from the first position whether the second part of a row follows the first

With is_decoder such a model is none: its tokens see only those before them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MASKED, PRETRAINING = "ForMaskedLM", "ForPreTraining"
PAIRS = "cls.seq_relationship"
"""Path of the head that tells whether the second part of a row follows the first."""


def is_encoder(fields: Mapping[str, Any]) -> bool:
    """Whether config.json `fields` are those of an encoder with a head for tokens."""
    return bool(_kind(fields.get("architectures"), decoder=fields.get("is_decoder")))


def predicts(config: Any) -> str:
    """MASKED or PRETRAINING for the transformers config of an encoder; empty for another model."""
    return _kind(config.architectures, decoder=getattr(config, "is_decoder", False))


def is_left_out(name: str, *, config: Any) -> bool:
    """Whether a stored tensor is one that an encoder which predicts masked tokens alone does not have:
    numbers of positions, as older versions of transformers stored them, or of the head for pairs.
    """
    if not predicts(config):
        return False
    of_pairs = ".pooler." in f".{name}" or name.startswith(f"{PAIRS}.")
    return name.endswith("position_ids") or (predicts(config) == MASKED and of_pairs)


def _kind(architectures: object, *, decoder: object) -> str:
    one = isinstance(architectures, list | tuple) and len(architectures) == 1
    name = str(architectures[0]) if one and not decoder else ""  # type: ignore[index]
    return next((kind for kind in (MASKED, PRETRAINING) if name.endswith(kind)), "")
