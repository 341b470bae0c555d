"""The sentences of a text, each encoded by itself, and marks where they begin (data/pairs.py).

A sentence ends at . ! ? … or their like with space behind, or at an empty line. Abbreviations end some too
early: for pairs of parts of text that does not matter.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import numpy as np

from hybridtrain.data.prepare.chat import Encoded

_CLOSING = "\"'\\u201d\\u2019\\u00bb)\\]}\\u300d\\u300f"
_END = re.compile(
    rf"(?<=[.!?\u2026\u061f\u0964])[{_CLOSING}]*(?=\s)|(?<=[\u3002\uff01\uff1f])[{_CLOSING}]*|(?=\n\s*\n)"
)
"""Between a sentence and the next one, which keeps the space before it."""


def split(text: str) -> list[str]:
    """The sentences of a text, which together are the text; what is only space belongs to the next one."""
    places = sorted({0, *(match.end() for match in _END.finditer(text)), len(text)})
    parts: list[str] = []
    held = ""
    for start, stop in itertools.pairwise(places):
        held += text[start:stop]
        if held.strip():
            parts.append(held)
            held = ""
    if held and parts:
        parts[-1] += held
    return parts


def encode(texts: list[str], *, encode: Callable[[list[str]], list[Encoded]]) -> list[Encoded]:
    """(ids, uint8 marks: 1 for the first token of a sentence) for each text."""
    divided = [split(text) for text in texts]
    encoded = iter(encode([sentence for sentences in divided for sentence in sentences]))
    results = []
    for sentences in divided:
        ids = [np.zeros(0, dtype=np.int32)]
        marks = [np.zeros(0, dtype=np.uint8)]
        for _ in sentences:
            ((part, _),) = next(encoded).samples
            ids.append(part)
            marks.append((np.arange(len(part)) == 0).astype(np.uint8))
        results.append(Encoded([(np.concatenate(ids), np.concatenate(marks))], [], "", ""))
    return results
