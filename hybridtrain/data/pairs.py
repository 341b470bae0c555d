"""Pairs of parts of text, for next sentence prediction (BERT, arXiv 1810.04805).

`prepare` with data.sentences finds where sentences begin, and rows of sentences:

    <split>.sentences.{bin,idx}   1 for the first token of a sentence, else 0
    <split>.pairs.npy             int64 (rows, 3): document, first token and end of each row's sentences

    row     s0 s1 s2 | s3 s4     sentences of one document; the rows of a document follow each other
            \\__A___/   \\_B_/     with probability 1/2 another B, as long as this, of another document

Where a row is divided, which other document it is, and what is cut off where both parts are too long, follow
from the sample's key (runtime/hashing.py).
"""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path

import numpy as np

from hybridtrain.data.indexed import COPY_BYTES, IndexedReader
from hybridtrain.data.rows import Block, Check
from hybridtrain.runtime import hashing

SPECIAL = 3
"""[CLS] and twice [SEP]: positions of a row that are no text."""
SHORTEST = 8
"""Length of the shortest rows."""
_UNRELATED, _DIVIDE, _OTHER, _DIVIDE_OTHER, _FRONT = range(5)
"""Purposes of random numbers (hashing.bits)."""


def row_file(folder: Path, *, split: str) -> Path:
    """The rows of a split."""
    return folder / f"{split}.pairs.npy"


def build(folder: Path, *, split: str, seq_len: int) -> int:
    """Write the rows of a split, and return their number.

    A document is cut into stretches of seq_len - 3 tokens; the sentences that begin in one are a row. Those
    of one sentence, which cannot be divided, are left out. There are none if all are of one document: no part
    of another could follow.
    """
    reader, marks = IndexedReader(folder / split), IndexedReader(folder / f"{split}.sentences")
    assert marks.dtype.itemsize == 1
    starts = np.asarray(marks.pointers)
    ends = np.append(starts[1:], marks.tokens)
    parts = [np.zeros((0, 3), dtype=np.int64)]
    first = 0
    while first < reader.documents:
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + COPY_BYTES)))
        begins = int(starts[first]) + np.flatnonzero(marks.read(int(starts[first]), int(ends[last - 1])))
        documents = np.searchsorted(starts, begins, side="right") - 1
        stretch = (begins - starts[documents]) // max(1, seq_len - SPECIAL)
        changes = np.flatnonzero((np.diff(documents, prepend=-1) != 0) | (np.diff(stretch, prepend=-1) != 0))
        counts = np.diff(np.append(changes, len(begins)))
        of = documents[changes]
        following = np.append(begins[changes][1:], ends[last - 1])
        rows = np.stack([of, begins[changes], np.minimum(following, ends[of])], axis=1)
        parts.append(rows[counts >= 2])
        first = last
    rows = np.concatenate(parts)
    if len(rows) and rows[0, 0] == rows[-1, 0]:
        rows = rows[:0]
    np.save(row_file(folder, split=split), rows)
    return len(rows)


class PairRows:
    """The rows of a split: two parts of text, together at most seq_len - 3 tokens."""

    masked = False

    def __init__(
        self, reader: IndexedReader, marks: IndexedReader, *, rows: np.ndarray, seq_len: int, check: Check
    ) -> None:
        """`marks`: of the sentences; `rows`: what `build` wrote."""
        self._reader, self._marks, self._rows, self._check = reader, marks, rows, check
        self._room, self._seq_len = seq_len - SPECIAL, seq_len

    def __len__(self) -> int:
        return len(self._rows)

    def pairs(self, row_ids: np.ndarray, *, keys: np.ndarray) -> Block:
        """Pairs for samples with these rows and keys."""
        block = Block.blank(len(row_ids), seq_len=self._seq_len, documents=False, masked=False, pairs=True)
        assert block.segments is not None
        assert block.unrelated is not None
        for place, (row, key) in enumerate(zip(row_ids, keys, strict=True)):
            first, second, unrelated = self._pair(int(row), key)
            first, second = self._cut(first, second, key)
            here, both = slice(len(first), len(first) + len(second)), np.concatenate([first, second])
            block.tokens[place, : len(both)] = both
            block.segments[place, : len(first)], block.segments[place, here] = 0, 1
            block.unrelated[place] = unrelated
        self._check(block.tokens)
        return block

    def documents(self, row: int) -> list[int]:
        return [int(self._rows[row, 0])]

    def _pair(self, row: int, key: np.uint64) -> tuple[np.ndarray, np.ndarray, bool]:
        """(first part, second part, whether it is of another document)."""
        document, start, stop = (int(value) for value in self._rows[row])
        middle = self._divided(row, key, purpose=_DIVIDE)
        first = self._reader.read(start, middle)
        if _below(key, 2, purpose=_UNRELATED) == 0:
            return first, self._reader.read(middle, stop), False
        other = _below(key, len(self._rows), purpose=_OTHER)
        if self._rows[other, 0] == document:  # the next one after this document's
            numbers = range(len(self._rows))
            other = bisect_right(numbers, document, key=lambda at: self._rows[at, 0]) % len(self._rows)
        begin = self._divided(other, key, purpose=_DIVIDE_OTHER)
        of = int(self._rows[other, 0])
        end = int(self._reader.pointers[of]) // self._reader.dtype.itemsize + int(self._reader.sizes[of])
        # Whole sentences, as many as are needed for the length of the part that they replace.
        wanted = begin + stop - middle
        after = np.flatnonzero(self._marks.read(min(wanted, end), min(wanted + self._room, end)))
        end = min(end, wanted + int(after[0]) if len(after) else end)
        return first, self._reader.read(begin, end), True

    def _divided(self, row: int, key: np.uint64, *, purpose: int) -> int:
        """The token at which the second part of a row begins: a sentence other than its first."""
        _, start, stop = (int(value) for value in self._rows[row])
        begins = start + np.flatnonzero(self._marks.read(start, stop))
        return int(begins[1 + _below(key, len(begins) - 1, purpose=purpose)])

    def _cut(self, first: np.ndarray, second: np.ndarray, key: np.uint64) -> tuple[np.ndarray, np.ndarray]:
        """The two parts without what does not fit: of the longer one first, each token at the front or the
        end with probability 1/2."""
        much = len(first) + len(second) - self._room
        if much <= 0:
            return first, second
        of_longer = min(much, abs(len(first) - len(second)))
        even, odd = divmod(much - of_longer, 2)
        from_first, from_second = (of_longer if len(first) > len(second) else 0) + even + odd, even
        from_second += of_longer if len(second) >= len(first) else 0
        cut = []
        for part, (tokens, count) in enumerate(((first, from_first), (second, from_second))):
            coins = hashing.bits(
                np.array([key]), np.arange(count) + part * (self._seq_len << 8), purpose=_FRONT
            )
            front = int((coins & np.uint64(1)).sum())
            cut.append(tokens[front : len(tokens) - (count - front)])
        return cut[0], cut[1]


def _below(key: np.uint64, size: int, *, purpose: int) -> int:
    """A random number of 0 to size - 1."""
    return int(hashing.uniform(np.array([key]), np.array([0]), purpose=purpose)[0] * size)
