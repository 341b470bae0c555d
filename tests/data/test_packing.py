"""How whole conversations fill rows: as few as best fit makes, in seconds, and their index."""

import itertools
import time
from pathlib import Path

import numpy as np
import pytest

from hybridtrain.data.indexed import IndexedReader, IndexedWriter
from hybridtrain.data.prepare import packing


def filled(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Tokens in each row of a packing, after checking that no row overflows and no row is missing."""
    row_of = packing.pack(sizes, capacity=capacity)
    full = np.bincount(row_of, weights=sizes).astype(int)
    assert full.max() <= capacity
    assert full.min() > 0
    return full


def best_fit(sizes: np.ndarray, capacity: int) -> int:
    """Rows that best fit, the longest first, needs; one item at a time."""
    left: list[int] = []
    for size in sorted(sizes.tolist(), reverse=True):
        fits = [(room, row) for row, room in enumerate(left) if room >= size]
        if fits:
            left[min(fits)[1]] -= size
        else:
            left.append(capacity - size)
    return len(left)


@pytest.mark.parametrize("seed", range(8))
def test_rows_are_as_few_as_best_fit_makes(seed):
    generator = np.random.default_rng(seed)
    capacity = int(generator.integers(5, 200))
    sizes = (
        generator.integers(1, capacity + 1, size=400)
        if seed % 2
        else np.minimum(capacity, 1 + generator.geometric(5 / capacity, size=400))
    )
    assert len(filled(sizes, capacity)) == best_fit(sizes, capacity)


def test_a_million_conversations_fill_their_rows_in_seconds():
    sizes = np.clip(np.random.default_rng(0).lognormal(5.5, 0.9, size=1_000_000), 4, 4097).astype(np.int32)
    start = time.perf_counter()
    full = filled(sizes, 4097)
    assert time.perf_counter() - start < 30  # measured 1 s
    assert full.sum() / (len(full) * 4097) > 0.999


def test_the_row_index(tmp_path: Path):
    sizes = [5, 9, 3, 20, 4, 1, 8]
    with IndexedWriter(tmp_path / "train", dtype=np.dtype("<u2")) as writer:
        for size in sizes:
            writer.add(np.arange(size))
    with IndexedWriter(tmp_path / "train.loss", dtype=np.dtype("u1")) as writer:
        for size in sizes:
            writer.add(np.arange(size) >= size - 2)
    made = packing.build(tmp_path, split="train", seq_len=9)
    assert (made.conversations, made.cut) == (7, 1)
    # the end of 20 is cut off; the first token, all there is of 1, is no target
    assert (made.tokens, made.targets) == (5 + 9 + 3 + 10 + 4 + 1 + 8, 5 * 2)
    ids, starts = (np.load(path, mmap_mode="r") for path in packing.row_files(tmp_path, split="train"))
    assert sorted(ids.tolist()) == list(range(7))
    rows = [ids[start:stop].tolist() for start, stop in itertools.pairwise(starts)]
    assert len(rows) == made.rows
    lengths = [sum(min(10, sizes[conversation]) for conversation in row) for row in rows]
    assert max(lengths) <= 10
    assert made.fill == sum(lengths) / (10 * len(rows))
    before = [path.read_bytes() for path in packing.row_files(tmp_path, split="train")]
    assert IndexedReader(tmp_path / "train").documents == 7
    packing.build(tmp_path, split="train", seq_len=9)
    assert [path.read_bytes() for path in packing.row_files(tmp_path, split="train")] == before
