"""Joins the pieces of a corpus into a pair of token files per split, without
duplicates, in bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hybridtrain.data.indexed import COPY_BYTES, IndexedReader, IndexedWriter, file_pair
from hybridtrain.data.prepare.pieces import LOSS_DTYPE
from hybridtrain.data.prepare.recipe import Recipe

BUCKET_DOCUMENTS = 1 << 24  # documents compared at a time, about 60 bytes each


@dataclass(frozen=True)
class Joined:
    """Statistics of one split."""

    documents: int
    tokens: int
    largest_id: int
    lengths: dict[str, float]
    """Tokens per document: min, median, mean, p90, p99, max."""

    @classmethod
    def nothing(cls) -> Joined:
        return cls(documents=0, tokens=0, largest_id=0, lengths={})


def first_of_each(folders: list[Path]) -> list[np.ndarray]:
    """For each piece a bool array (documents,): True for documents that are the first among identical ones.

    Compares 128-bit digests, one bucket of equal leading bits at a time. Memory: one byte per
    document, and one bucket.
    """
    digests = [np.load(folder / "digests.npy", mmap_mode="r") for folder in folders]
    ends = np.cumsum([len(one) for one in digests])
    total = int(ends[-1])
    keep = np.zeros(total, dtype=bool)
    bits = max(0, (total // BUCKET_DOCUMENTS).bit_length())
    for bucket in range(1 << bits):
        places, high, low = [], [], []
        for one, end in zip(digests, ends, strict=True):
            chosen = (
                np.flatnonzero(one["high"] >> np.uint64(64 - bits) == bucket) if bits else np.arange(len(one))
            )
            places.append(chosen + (int(end) - len(one)))
            high.append(one["high"][chosen])
            low.append(one["low"][chosen])
        place, first, second = np.concatenate(places), np.concatenate(high), np.concatenate(low)
        order = np.lexsort((second, first))  # stable: identical ones stay in the corpus's order
        new = np.ones(len(order), dtype=bool)
        new[1:] = (np.diff(first[order]) != 0) | (np.diff(second[order]) != 0)
        keep[place[order[new]]] = True
    return np.split(keep, ends[:-1])


def join(
    folders: list[Path],
    *,
    split: str,
    out: Path,
    recipe: Recipe,
    keep: list[np.ndarray] | None,
    identity: hashlib._Hash,
) -> Joined:
    """Concatenate one split of all pieces into the pair `out`, and for packed corpora the
    loss masks into `<out>.loss`.

    Adds sizes, tokens and loss masks to the hash `identity`, in this order. `keep`: result
    of `first_of_each`, or None.
    """
    kept: list[np.ndarray | None] = [None] * len(folders)
    if keep is not None:
        kept = [_of_split(folder, flags, split=split) for folder, flags in zip(folders, keep, strict=True)]
    _concatenate([folder / split for folder in folders], kept=kept, out=out, dtype=recipe.dtype)
    if not file_pair(out)[0].exists():
        return Joined.nothing()
    reader = IndexedReader(out)
    for start in range(0, reader.documents, COPY_BYTES):
        identity.update(reader.sizes[start : start + COPY_BYTES].tobytes())
    largest = 0
    for block in _blocks(out, dtype=recipe.dtype):
        identity.update(block.tobytes())
        largest = max(largest, int(block.max()))
    if recipe.marks:
        loss = out.with_name(f"{out.name}.{recipe.marks}")
        _concatenate([folder / loss.name for folder in folders], kept=kept, out=loss, dtype=LOSS_DTYPE)
        for block in _blocks(loss, dtype=LOSS_DTYPE):
            identity.update(block.tobytes())
    return Joined(
        documents=reader.documents,
        tokens=reader.tokens,
        largest_id=largest,
        lengths=_lengths(reader.sizes, tokens=reader.tokens),
    )


def _of_split(folder: Path, flags: np.ndarray, *, split: str) -> np.ndarray:
    held_out = np.load(folder / "digests.npy", mmap_mode="r")["held_out"]
    return flags[held_out == (split == "eval")]


def _concatenate(prefixes: list[Path], *, kept: list[np.ndarray | None], out: Path, dtype: np.dtype) -> None:
    with IndexedWriter(out, dtype=dtype) as writer:
        for prefix, keep in zip(prefixes, kept, strict=True):
            if file_pair(prefix)[0].exists():
                reader = IndexedReader(prefix)
                writer.append(reader, keep=np.ones(reader.documents, dtype=bool) if keep is None else keep)


def _blocks(prefix: Path, *, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The tokens in parts; read, not memory-mapped, so that memory use stays small."""
    with file_pair(prefix)[0].open("rb") as file:
        while len(block := np.fromfile(file, dtype=dtype, count=COPY_BYTES)):
            yield block


def _lengths(sizes: np.ndarray, *, tokens: int) -> dict[str, float]:
    """Nearest-rank percentiles of the sizes, int32 (n,)."""
    ranks = {"min": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    places = {name: max(0, int(np.ceil(share * len(sizes))) - 1) for name, share in ranks.items()}
    ordered = np.partition(sizes, sorted(set(places.values())))
    values: dict[str, float] = {name: int(ordered[place]) for name, place in places.items()}
    return {
        "min": values["min"],
        "median": values["median"],
        "mean": round(tokens / len(sizes), 1),
        "p90": values["p90"],
        "p99": values["p99"],
        "max": values["max"],
    }
