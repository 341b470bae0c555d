"""A rank's part of a parameter under DeepSpeed's ZeRO: consecutive elements in row-major
order, as rectangular chunks.

A DCP checkpoint holds rectangular chunks. Consecutive elements of a matrix are at most three: the rest of a
row, whole rows, the beginning of a row.

    whole (6, 4), elements 6 to 17:   . . . .
                                      . . x x     (1, 2)
                                      x x x x  \\
                                      x x x x  /  (2, 4)
                                      x x . .     (1, 2)
                                      . . . .
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Chunk = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, sizes)."""


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements, from `start` on, of the chunk (`offsets`, `sizes`) of a tensor of `shape`.

    `values`: these elements, 1-D, on this rank.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    values: Tensor

    def pieces(self) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """(offsets in the whole tensor, view of `values` in the shape of the chunk) of each chunk."""
        done = 0
        for offsets, sizes in _chunks(self.sizes, start=self.start, count=self.values.numel()):
            count = math.prod(sizes)
            yield (
                tuple(a + b for a, b in zip(self.offsets, offsets, strict=True)),
                self.values[done : done + count].view(sizes),
            )
            done += count

    def slices(self) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        """(slices of the whole tensor, view of `values` in the shape of the chunk) of each chunk."""
        for offsets, piece in self.pieces():
            yield (
                tuple(
                    slice(offset, offset + size) for offset, size in zip(offsets, piece.shape, strict=True)
                ),
                piece,
            )

    def at(self, values: Tensor) -> Fragment:
        """The same fragment with other `values`, e.g. a copy."""
        return Fragment(self.shape, self.offsets, self.sizes, self.start, values)

    def fill(self, whole: Tensor) -> None:
        """Write the elements into a tensor of the whole shape."""
        for place, piece in self.slices():
            whole[place] = piece

    def chunks(self) -> list[ChunkStorageMetadata]:
        """The chunks, as DCP describes them."""
        return [ChunkStorageMetadata(torch.Size(offsets), piece.shape) for offsets, piece in self.pieces()]

    def write_items(self, key: str) -> list[WriteItem]:
        """DCP's write items, one for each chunk."""
        properties = TensorProperties.create_from_tensor(self.values)
        return [
            WriteItem(
                MetadataIndex(key, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, torch.Size(self.shape)),
            )
            for chunk in self.chunks()
        ]

    def lookup(self, index: MetadataIndex) -> Tensor:
        """The view of the chunk at `index.offset`."""
        return next(piece for offsets, piece in self.pieces() if torch.Size(offsets) == index.offset)


def _chunks(sizes: tuple[int, ...], *, start: int, count: int) -> Iterator[Chunk]:
    """Chunks that together are `count` elements of a tensor of `sizes`, from element `start` on, in order."""
    if count == 0:
        return
    if len(sizes) == 1:
        yield (start,), (count,)
        return
    row = math.prod(sizes[1:])
    first, skip = divmod(start, row)
    if skip or count < row:
        part = min(count, row - skip)
        for offsets, inner in _chunks(sizes[1:], start=skip, count=part):
            yield (first, *offsets), (1, *inner)
        yield from _chunks(sizes, start=start + part, count=count - part)
        return
    rows = count // row
    yield (first, *(0 for _ in sizes[1:])), (rows, *sizes[1:])
    yield from _chunks(sizes, start=start + rows * row, count=count - rows * row)
