"""Cuts long texts into parts whose tokens are together those of the whole text.

Encoding a text uses one core and about 100 bytes of memory per character: 100 MB in one piece would take 10
GB. Tokenizers first split a text into words, and no token spans two words: a text can be cut where a word
begins in any context. These places are tested with the tokenizer itself, first by kind, then at each place
with the text around it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from hybridtrain.errors import refusal

CHUNK_CHARS = 1 << 16  # approximate length of a part
MOST_CHARS = 1 << 24  # largest part, if there is no place to cut
_AROUND_CHARS = 256  # text on each side of a place that is tested
_TRIES = 16  # places of one kind that are tested in a chunk

_LETTER = r"[^\W\d_]"
_MARKS = ",.;:!?\u3001\u3002\uff01\uff0c\uff0e\uff1a\uff1b\uff1f"  # Latin, Chinese and Japanese
_KINDS: tuple[tuple[re.Pattern[str], int, tuple[tuple[str, str], ...]], ...] = (
    # (pattern, its characters before the cut, sample texts whose tokens must add up)
    (
        re.compile(rf"{_LETTER} {_LETTER}"),
        1,
        (
            ("a", " b c"),
            ("x = 1)\ndef", " function():\n"),
            ("end. The", " end\n\n"),
            ("1  é", " ßx"),
            ("return", " x"),
        ),
    ),
    (
        re.compile(r"\S \S"),
        1,
        (("a", " 12 b"), ("12", " 345,"), ("x)", " (y"), ("};", ' "a'), ("1.5e-3", " 7"), ("'", " 's x")),
    ),
    (
        re.compile(r"\S\n[^\W_]"),
        2,
        (
            ("a\n", "b c"),
            ("12\n", "x"),
            ("0.5\n", "12,3"),
            ("};\n", "def f"),
            ("é.\n", "ß"),
            ("x -\n", "日本"),
        ),
    ),
    (
        re.compile(rf"{_LETTER}[{_MARKS}]{_LETTER}"),
        1,
        (("日本", "。字と"), ("a", ",b"), ("字", "、日 a"), ("x", ".y z"), ("ab", "!b")),
    ),
    (re.compile(r"[0-9][,.;:][0-9]"), 1, (("1", ",2"), ("0.123", ".4567"), ("12", ":30;"), ("1234", ",5"))),
    (re.compile(r"[A-Za-z][0-9]"), 1, (("a", "1 b"), ("xyz", "123456"), ("Qm", "9Fk"), ("é a", "7"))),
    (re.compile(r"[0-9][A-Za-z]"), 1, (("1", "a b"), ("123", "xyz"), ("9", "Fk2"), ("2024", "Q"))),
)


def add_up(encode: Callable[[str], list[int]], *, samples: tuple[tuple[str, str], ...]) -> bool:
    """Whether the tokens of the two parts of each sample are those of the whole (false e.g. if each text
    gets a space prefix).
    """
    return all(encode(head + tail) == encode(head) + encode(tail) for head, tail in samples)


class Cutter:
    """Cuts texts for one tokenizer, given as a function from a text to its ids."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        self._encode = encode
        self.kinds = [
            (pattern, before) for pattern, before, samples in _KINDS if add_up(encode, samples=samples)
        ]

    def parts(self, text: str) -> Iterator[str]:
        """The text in parts. Raises UserError if a part without a place to cut is too long."""
        start = 0
        while (place := self._place(text, start + CHUNK_CHARS)) is not None:
            yield self._fitting(text[start:place])
            start = place
        yield self._fitting(text[start:])

    def _place(self, text: str, first: int) -> int | None:
        for at in range(first, len(text), CHUNK_CHARS):
            for pattern, before in self.kinds:
                for tries, match in enumerate(pattern.finditer(text, at, min(len(text), at + CHUNK_CHARS))):
                    place = match.start() + before
                    if add_up(
                        self._encode,
                        samples=((text[place - _AROUND_CHARS : place], text[place : place + _AROUND_CHARS]),),
                    ):
                        return place
                    if tries == _TRIES:
                        break
        return None

    def _fitting(self, part: str) -> str:
        if len(part) > MOST_CHARS:
            words = (
                f"it has {len(part):,} characters without an end of a word for this tokenizer; "
                f"encoding them takes {len(part) * 160 >> 30} GiB"
            )
            raise refusal(
                "data.source",
                "a document",
                words,
                allowed=f"{MOST_CHARS:,} such characters",
                instead="the document in several",
            )
        return part
