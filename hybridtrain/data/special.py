"""The special tokens of a tokenizer, by name, from the files of its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridtrain.data.prepare import tokenizer
from hybridtrain.runtime.files import read_object

FIELD = "data.path"
_SUFFIX = "_token"


def special_tokens(folder: Path) -> dict[str, int]:
    """Name -> id of every special token: mask, cls, sep, pad ...; others are special0, special1 ...

    Empty without a tokenizer. Raises UserError for one that cannot be read.
    """
    if not folder.is_dir():
        return {}
    numbers = _numbers(folder)
    named = {name: numbers[text] for name, text in _names(folder).items() if text in numbers}
    others = [number for number in numbers.values() if number not in named.values()]
    return {**named, **{f"special{place}": number for place, number in enumerate(sorted(others))}}


def _numbers(folder: Path) -> dict[str, int]:
    """Text of a special token -> id."""
    if (folder / "tokenizer.json").is_file():
        added = read_object(folder / "tokenizer.json", field=FIELD).get("added_tokens") or []
        return {str(token["content"]): int(token["id"]) for token in added if token.get("special")}
    slow = tokenizer.load(str(folder), field=FIELD)
    return dict(zip(map(str, slow.all_special_tokens), slow.all_special_ids, strict=True))


def _names(folder: Path) -> dict[str, str]:
    """mask, cls ... -> the text of the token."""
    names: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in (
            read_object(folder / file, field=FIELD).items() if (folder / file).is_file() else ()
        ):
            text: Any = value.get("content") if isinstance(value, Mapping) else value
            if key.endswith(_SUFFIX) and isinstance(text, str):
                names[key.removesuffix(_SUFFIX)] = text
    return names
