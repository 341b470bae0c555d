"""Which parts of a long document are held out for evaluation.

    |---- stretch 0 ----|-------- stretch 1 --------|---------------- stretch 2 ...        each holds one block, where a hash puts it
           [block]                   [ block ]                    [   block   ]

A document that is much of its corpus cannot be held out whole, nor not at all. So blocks of it are: of 2 KiB at its beginning, then of
twice as much up to 16 KiB (some 4,000 tokens), each in a stretch that is longer by 1 / data.eval_fraction. Where they lie follows from the
document's key, the fraction and the place alone: what is appended to a document, or beside it, moves none of them. What lies between
two blocks stays in one piece.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

LONG = 50  # a document longer than 1/50 of the corpus is cut
LEAST_BYTES = 1 << 13  # and none shorter than this
_SMALLEST, _LARGEST = 1 << 11, 1 << 14  # characters of a block
_EDGE_CHARS = 256  # a block begins and ends at a line or a word, if there is one so near
BY_CHANCE, SURELY, WHOLE = "blocks", "first block", "all"
"""How a source is held out: the blocks that chance puts into it, one near its beginning in any case, or as a whole."""


def is_long(size: int, *, total: int) -> bool:
    """Whether a document of `size` bytes, in a corpus of `total` bytes, is split into blocks."""
    return size >= LEAST_BYTES and size * LONG > total


def share(digest: bytes) -> float:
    """A place in [0, 1) that follows from a hash."""
    return int.from_bytes(digest[:8], "big") / 2**64


def places(key: str, *, fraction: float, how: str) -> Iterator[tuple[int, int]]:
    """(start, stop) of the blocks in characters, without end."""
    start, size, number = 0, _SMALLEST, 0
    while True:
        stretch = max(size, round(size / fraction))
        room = stretch - size
        if number == 0 and how == SURELY:
            room = min(room, LEAST_BYTES // 2 - size)
        at = start + int(share(hashlib.sha256(f"{key}\0{number}".encode("utf-8", "surrogateescape")).digest()) * room)
        yield at, at + size
        start, size, number = start + stretch, min(2 * size, _LARGEST), number + 1


def cut(text: str, *, key: str, fraction: float, how: str) -> Iterator[tuple[str, bool]]:
    """The parts of a text in order, and whether each is held out."""
    done = 0
    for start, stop in places(key, fraction=fraction, how=how):
        if start >= len(text):
            break
        first = max(done, _edge(text, start))
        last = max(first, _edge(text, stop))
        yield from ((part, held_out) for part, held_out in ((text[done:first], False), (text[first:last], True)) if part)
        done = last
    if done < len(text):
        yield text[done:], False


def _edge(text: str, at: int) -> int:
    if at >= len(text):
        return len(text)
    found = next((place for mark in ("\n", " ") if (place := text.find(mark, at, at + _EDGE_CHARS)) >= 0), at - 1)
    return found + 1
