"""Words with a label each: token ids of the words, joined by spaces, and the class of the first token of each
word (tasks/token_classification.py).

{"text": ["Ada", "sleeps"], "label": ["name", "verb"]}

    token ids   [CLS]   A   ##da   sleeps   [SEP]    -       one more than the text has
    marks         0     0     1       0       2      0

A mark is the class + 1 of the token before it, or 0 where that has no label: rows are then laid out as those
of texts with a class after them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hybridtrain.config.schema import DataConfig
from hybridtrain.data.prepare.chat import Encoded
from hybridtrain.data.prepare.labelled import CUT, LabelRecipe, number_of
from hybridtrain.errors import refusal

MOST = 255
"""Classes that a mark can tell."""
NO_TOKEN = "documents with words that have no token of their own, whose labels are left out"


class Words(NamedTuple):
    """Words, joined by spaces, and the number of the class of each."""

    text: str
    ends: list[int]
    """Of each word, in characters."""
    starts: list[int]
    labels: list[int]


def check(data: DataConfig) -> None:
    """Refuse more classes than marks have room for (raises UserError)."""
    if len(data.labels) > MOST:
        raise refusal(
            "data.labels",
            f"({len(data.labels)} names)",
            "the class of a token is stored in a byte",
            allowed=f"up to {MOST} classes",
            instead="fewer classes",
        )


def document(
    words: Any, labels: Any, *, recipe: LabelRecipe, forms: dict[str, int]
) -> tuple[Words | None, bytes, str]:
    """(document, its identity, problem) from a list of words and a list of labels.

    The document is None if there is a problem, or no word. Counts words per class in `forms`.
    """
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        return None, b"", f"its text is no list of words but {repr(words)[:60]}"
    if not isinstance(labels, list):
        return None, b"", f"its field {recipe.key!r} holds no list of labels but {repr(labels)[:60]}"
    if len(words) != len(labels):
        return None, b"", f"it has {len(words)} words and {len(labels)} labels"
    numbers = []
    for label in labels:
        number, unknown = number_of(label, recipe=recipe)
        if unknown:
            return None, b"", unknown
        numbers.append(number)
    known = [word.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for word in words]
    if not any(word.strip() for word in known):
        return None, b"", ""
    ends = np.cumsum([len(word) + 1 for word in known]) - 1
    for number in numbers:
        forms[recipe.names[number]] = forms.get(recipe.names[number], 0) + 1
    text = " ".join(known)
    starts = [int(end) - len(word) for end, word in zip(ends, known, strict=True)]
    content = text.encode() + f"\0{starts}\0{numbers}".encode()
    return Words(text, [int(end) for end in ends], starts, numbers), content, ""


def encode(documents: list[Words], *, tokenizer: Any, recipe: LabelRecipe) -> list[Encoded]:
    """One sample per document: token ids of its words, with the tokenizer's special tokens, and marks."""
    texts = [document.text for document in documents]
    whole, cut = (
        tokenizer(
            texts,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            truncation=truncation,
            max_length=recipe.seq_len if truncation else None,
        )
        for truncation in (False, True)
    )
    encoded = []
    for number, document in enumerate(documents):
        ids, offsets = cut["input_ids"][number], cut["offset_mapping"][number]
        classes, alone = _classes(document, offsets, special=cut["special_tokens_mask"][number])
        notes = [CUT] if len(ids) < len(whole["input_ids"][number]) else []
        within = max((end for _, end in offsets), default=0)
        words = sum(start < within for start in document.starts)
        notes += [NO_TOKEN] if alone < words else []
        marks = np.zeros(len(ids) + 1, dtype=np.uint8)
        marks[1:] = classes + 1
        encoded.append(Encoded([(np.array([*ids, *ids[-1:]], dtype=np.int32), marks)], notes, "", ""))
    return encoded


def _classes(
    document: Words, offsets: list[tuple[int, int]], *, special: list[int]
) -> tuple[np.ndarray, int]:
    """(class of each token, -1 without one; number of words that have a token)."""
    classes, word = np.full(len(offsets), -1, dtype=np.int64), 0
    found = 0
    for place, ((start, end), ours) in enumerate(zip(offsets, special, strict=True)):
        if ours or start == end:
            continue
        while word < len(document.ends) and document.ends[word] <= start:
            word += 1  # it ends before this token: none began in it
        if word < len(document.ends) and end > document.starts[word]:
            classes[place] = document.labels[word]
            word, found = word + 1, found + 1
    return classes, found
