"""The blocks of a long document that are held out for evaluation.

    |---- stretch 0 ----|-------- stretch 1 --------|---------------- stretch 2 ...  one block each, by a hash
           [block]                   [ block ]                    [   block   ]

A document that is a large part of its corpus must be held out neither whole nor not at all. So blocks of it
are: the first has 2 KiB, each next one twice as much up to 16 KiB (about 4,000 tokens), each in a stretch
of its size / data.eval_fraction. Their places depend only on the document's key, the fraction and the
position: text appended to the document, or other documents, do not move them. The text between two blocks
stays in one piece.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

LONG = 50  # documents longer than 1/50 of the corpus are split into blocks
LEAST_BYTES = 1 << 13  # but none shorter than this
_SMALLEST, _LARGEST = 1 << 11, 1 << 14  # characters of a block
_EDGE_CHARS = 256  # a block begins and ends at a line or word, if there is one within this distance
BY_CHANCE, SURELY, WHOLE = "blocks", "first block", "all"
"""How a source is held out: blocks placed by a hash; the same with one near the beginning;
or the whole source."""


def is_long(size: int, *, total: int) -> bool:
    """Whether a document of `size` bytes, in a corpus of `total` bytes, is split into blocks."""
    return size >= LEAST_BYTES and size * LONG > total


def share(digest: bytes) -> float:
    """A number in [0, 1) from a hash."""
    return int.from_bytes(digest[:8], "big") / 2**64


def places(key: str, *, fraction: float, how: str) -> Iterator[tuple[int, int]]:
    """(start, stop) of the blocks in characters; an infinite iterator. `how`: BY_CHANCE or SURELY."""
    start, size, number = 0, _SMALLEST, 0
    while True:
        stretch = max(size, round(size / fraction))
        room = stretch - size
        if number == 0 and how == SURELY:
            room = min(room, LEAST_BYTES // 2 - size)
        at = start + int(
            share(hashlib.sha256(f"{key}\0{number}".encode("utf-8", "surrogateescape")).digest()) * room
        )
        yield at, at + size
        start, size, number = start + stretch, min(2 * size, _LARGEST), number + 1


def cut(text: str, *, key: str, fraction: float, how: str) -> Iterator[tuple[str, bool]]:
    """(part, whether it is held out) for the parts of a text, in order."""
    done = 0
    for start, stop in places(key, fraction=fraction, how=how):
        if start >= len(text):
            break
        first = max(done, _edge(text, start))
        last = max(first, _edge(text, stop))
        yield from (
            (part, held_out)
            for part, held_out in ((text[done:first], False), (text[first:last], True))
            if part
        )
        done = last
    if done < len(text):
        yield text[done:], False


def _edge(text: str, at: int) -> int:
    if at >= len(text):
        return len(text)
    found = next(
        (place for mark in ("\n", " ") if (place := text.find(mark, at, at + _EDGE_CHARS)) >= 0), at - 1
    )
    return found + 1
