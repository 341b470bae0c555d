"""A tokenizer's special tokens, by name, and which tokens continue a word, from the files of its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hybridtrain.data.prepare import tokenizer
from hybridtrain.errors import refusal
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


def continuing(folder: Path) -> np.ndarray:
    """Whether each token continues the word of the one before it: bool (V,).

    Raises UserError for a tokenizer that does not tell.
    """
    content = read_object(folder / "tokenizer.json", field=FIELD) if _is_fast(folder) else {}
    model = content.get("model", {})
    vocab = model.get("vocab")
    if isinstance(vocab, Mapping):
        tokens = {number: token for token, number in vocab.items()}
    else:
        tokens = {number: entry[0] for number, entry in enumerate(vocab or [])}
    prefix = model.get("continuing_subword_prefix")
    spaces = [mark for mark in _SPACES if any(token.startswith(mark) for token in tokens.values())]
    if not (prefix or spaces):
        problem = f"the tokenizer in {folder} marks neither what continues a word nor what begins one"
        allowed, instead = "false with it", "task.whole_words=false"
        raise refusal("task.whole_words", True, problem, allowed=allowed, instead=instead)
    result = np.zeros(max(tokens) + 1, dtype=bool)
    for number, token in tokens.items():
        result[number] = token.startswith(prefix) if prefix else _continues(token[:1], space=spaces[0])
    special = [number for number in _numbers(folder).values() if number < len(result)]
    result[special] = False
    return result


def _continues(first: str, *, space: str) -> bool:
    """Whether a token that begins so, without a space, continues a word: with a letter or digit.

    A byte-level tokenizer writes bytes as characters, those of letters that are not ASCII as others than
    U+0100 to U+0120.
    """
    if space == _SPACES[0] and not first.isascii():
        return not "\u0100" <= first <= "\u0120"
    return first.isalnum()


_SPACES = ("\u0120", "\u2581")
"""How byte-level and SentencePiece tokenizers write the space before a word."""


def _is_fast(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file()


def _numbers(folder: Path) -> dict[str, int]:
    """Text of a special token -> id."""
    if _is_fast(folder):
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
