"""Packs whole conversations into rows of at most seq_len + 1 tokens: best fit, longest first.

`prepare` does it once.

    <split>.idx -> <split>.rows.npy          int64, ids of conversations, row after row
                   <split>.row_starts.npy    int64 (rows + 1,): row r has ids row_starts[r] to row_starts[r +
                                             1]

Conversations of equal length are placed together, so that Python loops over lengths and numpy over
conversations. Krell et al., "Efficient Sequence Packing without Cross-contamination", 2021.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hybridtrain.data.indexed import COPY_BYTES, IndexedReader


@dataclass(frozen=True)
class PackedRows:
    """The result of `build` for one split."""

    rows: int
    conversations: int
    cut: int
    """Conversations longer than a row, which are truncated."""
    fill: float
    """Share of tokens in rows that are not padding."""
    tokens: int
    """Tokens of the conversations after truncation."""
    targets: int
    """Those of these tokens that are targets."""


def row_files(folder: Path, *, split: str) -> tuple[Path, Path]:
    """The two files of a split's row index: (rows, row starts)."""
    return folder / f"{split}.rows.npy", folder / f"{split}.row_starts.npy"


def build(folder: Path, *, split: str, seq_len: int) -> PackedRows:
    """Write the row index of `<folder>/<split>.idx`. Equal sizes give equal rows."""
    sizes = np.asarray(IndexedReader(folder / split).sizes)
    length = seq_len + 1
    lengths = np.minimum(sizes, length)
    row_of = pack(lengths, capacity=length)
    order = np.argsort(row_of, kind="stable")
    starts = np.zeros(int(row_of.max()) + 2, dtype=np.int64)
    np.cumsum(np.bincount(row_of), out=starts[1:])
    for path, array in zip(row_files(folder, split=split), (order, starts), strict=True):
        np.save(path, array)
    rows, tokens = len(starts) - 1, int(lengths.sum(dtype=np.int64))
    loss_tokens = int(sum(part.sum() for part in targets(folder, split=split, seq_len=seq_len)))
    return PackedRows(
        rows=rows,
        conversations=len(sizes),
        cut=int((sizes > length).sum()),
        fill=tokens / (rows * length),
        tokens=tokens,
        targets=loss_tokens,
    )


def targets(folder: Path, *, split: str, seq_len: int) -> Iterator[np.ndarray]:
    """Number of targets of each conversation in its row, as consecutive int64 arrays.

    The first token of a conversation is no target, nor are truncated tokens.
    """
    reader = IndexedReader(folder / f"{split}.loss")
    assert reader.dtype.itemsize == 1
    starts, sizes = np.asarray(reader.pointers), np.asarray(reader.sizes, dtype=np.int64)
    first = 0
    while first < len(sizes):
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + COPY_BYTES)))
        sums = np.concatenate(
            [
                [0],
                np.cumsum(
                    reader.read(int(starts[first]), int(starts[last - 1] + sizes[last - 1])) != 0,
                    dtype=np.int64,
                ),
            ]
        )
        firsts = starts[first:last] - starts[first] + 1
        ends = firsts - 1 + np.minimum(sizes[first:last], seq_len + 1)
        yield sums[ends] - sums[np.minimum(firsts, ends)]
        first = last


def pack(sizes: np.ndarray, *, capacity: int) -> np.ndarray:
    """Row of each item, int64 (n,), by best fit, largest first.

    `sizes`: integers (n,), 1 <= sizes <= capacity.
    """
    assert len(sizes)
    assert 1 <= sizes.min() <= sizes.max() <= capacity
    order = np.argsort(-sizes.astype(np.int64), kind="stable")
    row_of = np.empty(len(sizes), dtype=np.int64)
    opened = 0
    room: dict[int, list[np.ndarray]] = {}  # free tokens -> rows with this many
    sizes_left: list[int] = []  # the keys of `room`, ascending

    def put_back(left: int, rows: np.ndarray) -> None:
        if left and len(rows):
            if left not in room:
                insort(sizes_left, left)
            room.setdefault(left, []).append(rows)

    edges = np.flatnonzero(np.diff(sizes[order], prepend=capacity + 1, append=0))
    for first, last in itertools.pairwise(edges):
        items, size = order[first:last], int(sizes[order[first]])
        while len(items):
            place = bisect_left(sizes_left, size)
            if place < len(sizes_left):
                left = sizes_left.pop(place)
                rows = np.concatenate(room.pop(left))
            else:
                left, rows = (
                    capacity,
                    np.arange(opened, opened - (-len(items) // (capacity // size)), dtype=np.int64),
                )
                opened += len(rows)
            each = left // size
            full, rest = divmod(min(len(items), each * len(rows)), each)
            placed = full * each + rest
            row_of[items[:placed]] = np.repeat(rows[: full + (rest > 0)], each)[:placed]
            put_back(left - each * size, rows[:full])
            put_back(left - rest * size, rows[full : full + (rest > 0)])
            put_back(left, rows[full + (rest > 0) :])
            items = items[placed:]
    return row_of
