"""Types and ranges of config.json fields, checked before anything is computed from them. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hybridtrain.errors import refusal

MOST_PARAMETERS = 10**13
_COUNTS: dict[str, tuple[int, int]] = {
    "num_hidden_layers": (1, 1 << 14),
    "hidden_size": (1, 1 << 24),
    "num_attention_heads": (1, 1 << 16),
    "num_key_value_heads": (1, 1 << 16),
    "head_dim": (1, 1 << 16),
    "intermediate_size": (1, 1 << 26),
    "vocab_size": (1, 1 << 28),
    "max_position_embeddings": (1, 1 << 40),
    "max_window_layers": (0, 1 << 14),
    "sliding_window": (1, 1 << 40),
}
"""Integers: field -> (smallest, largest)."""
_NUMBERS: dict[str, tuple[float, float, str]] = {
    "rms_norm_eps": (0.0, 1.0, "above 0, up to 1"),
    "rope_theta": (0.0, 1e18, "above 0, up to 1e18"),
    "factor": (0.0, 1e6, "above 0, up to 1e6"),
    "initializer_range": (-1e-300, 1.0, "0 to 1"),
    "partial_rotary_factor": (0.0, 1.0, "above 0, up to 1"),
    "attention_dropout": (-1e-300, 0.999, "0 to 0.999"),
}
"""Numbers: field -> (lower bound, exclusive; upper bound, inclusive; the range as text)."""
_FLAGS = ("tie_word_embeddings", "use_sliding_window", "attention_bias", "mlp_bias", "use_cache")
_LAYER_TYPES = ("full_attention", "sliding_attention")
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


def check_fields(fields: Mapping[str, Any]) -> None:
    """Refuse values that no model can have (raises UserError). Missing and null fields pass."""
    for key, (least, most) in _COUNTS.items():
        _count(key, fields.get(key), least, most)
    for key, (low, high, words) in _NUMBERS.items():
        _number(key, fields.get(key), low, high, words)
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(fields.get(key), Mapping):
            for name, (low, high, words) in _NUMBERS.items():
                _number(f"{key}.{name}", fields[key].get(name), low, high, words)
    for key in _FLAGS:
        if fields.get(key) is not None and not isinstance(fields[key], bool):
            raise refusal(
                f"model.config.{key}",
                _short(fields[key]),
                "not a yes or no",
                allowed="true, false",
                instead=f"model.config.{key}=false",
            )
    if fields.get("hidden_act") is not None and not isinstance(fields["hidden_act"], str):
        raise refusal(
            "model.config.hidden_act",
            _short(fields["hidden_act"]),
            "not a name",
            allowed="a name",
            instead="model.config.hidden_act=silu",
        )
    _layer_types(fields)
    _tokens(fields)


def _count(key: str, value: object, least: int, most: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise refusal(
            f"model.config.{key}",
            _short(value),
            "not a whole number",
            allowed=f"{least} to {most:,}",
            instead="the published value",
        )
    if not least <= value <= most:
        raise refusal(
            f"model.config.{key}",
            _short(value),
            "out of range",
            allowed=f"{least} to {most:,}",
            instead="the published value",
        )


def _number(key: str, value: object, low: float, high: float, words: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refusal(
            f"model.config.{key}", _short(value), "not a number", allowed=words, instead="the published value"
        )
    if not (math.isfinite(value) and low < value <= high):
        raise refusal(
            f"model.config.{key}", _short(value), "out of range", allowed=words, instead="the published value"
        )


def _layer_types(fields: Mapping[str, Any]) -> None:
    listed, layers = fields.get("layer_types"), fields.get("num_hidden_layers")
    if listed is None:
        return
    names = ", ".join(_LAYER_TYPES)
    if not isinstance(listed, list) or any(name not in _LAYER_TYPES for name in listed):
        raise refusal(
            "model.config.layer_types",
            _short(listed),
            "not a list of kinds of attention",
            allowed=names,
            instead="null, or the published list",
        )
    if len(listed) != layers:
        words = f"{len(listed)} entries for num_hidden_layers={layers}"
        raise refusal(
            "model.config.layer_types",
            _short(listed),
            words,
            allowed=f"{layers} of {names}",
            instead="null, or a list of that length",
        )


def _tokens(fields: Mapping[str, Any]) -> None:
    vocab = fields.get("vocab_size")
    for key in _TOKENS:
        ids = fields.get(key)
        for token in ids if isinstance(ids, list) and key == "eos_token_id" else [ids]:
            if token is None:
                continue
            if isinstance(token, bool) or not isinstance(token, int):
                raise refusal(
                    f"model.config.{key}",
                    _short(ids),
                    "not a token id",
                    allowed="a whole number",
                    instead="null",
                )
            if key == "pad_token_id" and vocab is not None and not -vocab <= token < vocab:
                raise refusal(
                    "model.config.pad_token_id",
                    token,
                    f"the vocabulary has {vocab} tokens",
                    allowed=f"0 to {vocab - 1}, or null",
                    instead="null",
                )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
