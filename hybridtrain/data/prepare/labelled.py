"""Texts with a label: token ids of the text, then the class number,
the only target (tasks/classification.py).

{"text": "...", "label": "positive"}  ->  token ids with special tokens, cut to data.seq_len  +  [1]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hybridtrain.config.schema import DataConfig
from hybridtrain.data.prepare.chat import Encoded
from hybridtrain.errors import refusal

CUT = "texts longer than data.seq_len tokens, cut at their end"


class Labelled(NamedTuple):
    """A text and the number of its class."""

    text: str
    label: int


@dataclass(frozen=True)
class LabelRecipe:
    """Options that decide how texts with labels become tokens."""

    names: list[str]
    """data.labels."""
    key: str
    """data.label_key."""
    seq_len: int
    """Largest number of tokens of a text."""
    form: str
    """data.format."""


def check(data: DataConfig) -> None:
    """Refuse fewer than two classes, and duplicate names (raises UserError)."""
    instead = "data.labels=[negative,positive]"
    if len(data.labels) < 2:
        raise refusal(
            "data.labels",
            data.labels,
            "fewer than two classes",
            allowed="the names of two classes or more",
            instead=instead,
        )
    if len(set(data.labels)) < len(data.labels):
        raise refusal(
            "data.labels", data.labels, "a name occurs twice", allowed="different names", instead=instead
        )


def number_of(value: Any, *, recipe: LabelRecipe) -> tuple[int, str]:
    """(number of the class, problem) for `value`, a class's name or number."""
    names = recipe.names
    if isinstance(value, str) and value in names:
        return names.index(value), ""
    if (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value == int(value)
        and 0 <= value < len(names)
    ):
        return int(value), ""
    known = f"{', '.join(names[:8])}{' ...' if names[8:] else ''}, nor a number below {len(names)}"
    return 0, f"its field {recipe.key!r} holds {repr(value)[:60]}, which is none of {known}"


def document(
    read: tuple[str, bytes, str], label: Any, *, recipe: LabelRecipe, forms: dict[str, int]
) -> tuple[Labelled | None, bytes, str]:
    """(document, its identity, problem) from `read`, (text, its bytes, problem), and a label.

    The document is None if there is a problem or no text. Counts documents per class in `forms`.
    """
    text, content, problem = read
    number, unknown = number_of(label, recipe=recipe)
    if problem or unknown or not text:
        return None, b"", problem or unknown
    name = recipe.names[number]
    forms[name] = forms.get(name, 0) + 1
    return Labelled(text, number), content + f"\0{number}".encode(), ""


def encode(documents: list[Labelled], *, tokenizer: Any, recipe: LabelRecipe) -> list[Encoded]:
    """One sample per document: token ids of its text, with the tokenizer's special tokens, and its label."""
    all_ids = tokenizer([document.text for document in documents])["input_ids"]
    long = [number for number, ids in enumerate(all_ids) if len(ids) > recipe.seq_len]
    if long:  # the tokenizer truncates before its special tokens at the end
        cut = tokenizer(
            [documents[number].text for number in long], truncation=True, max_length=recipe.seq_len
        )["input_ids"]
        for number, ids in zip(long, cut, strict=True):
            all_ids[number] = ids
    encoded = []
    for number, (ids, document) in enumerate(zip(all_ids, documents, strict=True)):
        mask = np.zeros(len(ids) + 1, dtype=np.uint8)
        mask[-1] = bool(ids)  # no target without tokens
        encoded.append(
            Encoded(
                [(np.array([*ids, document.label], dtype=np.int32), mask)],
                [CUT] if number in long else [],
                "",
                "",
            )
        )
    return encoded
