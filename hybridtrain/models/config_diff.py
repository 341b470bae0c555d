"""Differences of two config.json, such as that of a checkpoint and an edited one. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VERSION = "transformers_version"
LABELS = (
    "architectures",
    "torch_dtype",
    "dtype",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
    "pretraining_tp",
    "_name_or_path",
)
"""Fields that do not change the outputs of a trained model."""


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields that differ: name, dotted for nested ones -> (before, now). A missing field equals null.

    Different versions of transformers write different fields; then only fields that both
    files have are compared.
    """
    one_writer = before.get(VERSION) == now.get(VERSION)
    old, new = _flat(before), _flat(now)
    names = (old.keys() | new.keys() if one_writer else old.keys() & new.keys()) - {VERSION}
    pairs = {name: (old.get(name), new.get(name)) for name in sorted(names)}
    return {name: pair for name, pair in pairs.items() if not _same(*pair)}


def model_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`changes` without LABELS."""
    return {name: pair for name, pair in changes(before, now).items() if name not in LABELS}


def describe(found: Mapping[str, tuple[Any, Any]]) -> str:
    """The first three of `changes` as text."""
    parts = [f"{name} was {str(was)[:60]} and is {str(is_now)[:60]}" for name, (was, is_now) in found.items()]
    return "; ".join([*parts[:3], *(["..."] if parts[3:] else [])])


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            result |= {f"{name}.{key}": item for key, item in _flat(value).items()}
        else:
            result[name] = value
    return result


def _same(was: Any, is_now: Any) -> bool:
    return bool(was == is_now) and isinstance(was, bool) == isinstance(is_now, bool)
