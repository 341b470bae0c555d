"""Token files in Megatron's `.bin/.idx` format: a streaming writer and a memory-mapped reader.

    .bin   the tokens of all documents, concatenated
    .idx   magic "MMIDIDX\\0\\0" | version <Q | dtype code <B | sequences <Q | document boundaries <Q
           | int32 tokens per sequence | int64 byte offset per sequence
           | int64 first sequence of each document, and the end

Files are compatible with Megatron's reader and writer. We write one sequence per document.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_left, bisect_right
from pathlib import Path

import numpy as np

from hybridtrain.data import prepare_command
from hybridtrain.errors import UserError, refusal

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
# Megatron's codes; 6 and 7 are floating point, not for tokens
_DTYPES: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_SAMPLES, _SAMPLE_TOKENS = 16, 64
COPY_BYTES = 1 << 22  # bytes, or entries of an index, in memory at a time


def token_dtype(vocab_size: int) -> np.dtype:
    """The type that Megatron uses for this vocabulary: uint16 below 65500 entries, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def file_pair(prefix: Path) -> tuple[Path, Path]:
    """The two files of `prefix`: (.bin, .idx)."""
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


class IndexedWriter:
    """Writes documents in constant memory; without documents it leaves no files.

    The end of the `with` block completes the index; an exception removes it. Until then the index has no
    header, so that an incomplete pair, left by a kill, is not readable.
    """

    def __init__(self, prefix: Path, *, dtype: np.dtype) -> None:
        self._bin_path, self._idx_path = file_pair(prefix)
        self._dtype = dtype
        self._documents = 0
        self._bin = self._bin_path.open("wb")
        self._idx = self._idx_path.open("wb")
        self._idx.write(bytes(_HEADER.size))

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._bin.close()
            self._idx.close()
            self._idx_path.unlink()

    def add(self, tokens: np.ndarray) -> None:
        """Append one document of integer ids, shape (n,)."""
        for first in range(0, len(tokens), COPY_BYTES):
            part = tokens[first : first + COPY_BYTES]
            written = part.astype(self._dtype)
            assert np.array_equal(written, part), f"an id that {self._dtype} cannot hold"
            self._bin.write(written.tobytes())
        self._add_sizes(np.array([len(tokens)]))

    def append(self, reader: IndexedReader, *, keep: np.ndarray) -> None:
        """Append the documents of another pair of the same dtype for which `keep`,
        bool (documents,), is True.
        """
        assert reader.dtype == self._dtype
        assert reader.sequences == reader.documents == len(keep)
        # runs of documents to keep: [first, last)
        edges = np.flatnonzero(np.diff(keep, prepend=False, append=False)).reshape(-1, 2)
        offsets = np.append(reader.pointers, reader.tokens * self._dtype.itemsize)
        with reader.bin_path.open("rb") as source:
            for start, stop in offsets[edges]:
                source.seek(start)
                for at in range(start, stop, COPY_BYTES):
                    self._bin.write(source.read(min(COPY_BYTES, stop - at)))
        self._add_sizes(reader.sizes[keep])

    def _add_sizes(self, sizes: np.ndarray) -> None:
        assert sizes.max(initial=0) < 1 << 31, "a document of more tokens than the format allows"
        self._idx.write(sizes.astype("<i4").tobytes())
        self._documents += len(sizes)

    def close(self) -> None:
        """fsync the tokens, then complete the index."""
        _synced_close(self._bin)
        if not self._documents:
            self._idx.close()
            self._bin_path.unlink()
            self._idx_path.unlink()
            return
        self._idx.flush()
        pointer = 0
        with self._idx_path.open("rb") as written:
            written.seek(_HEADER.size)
            for first in range(0, self._documents, COPY_BYTES):
                sizes = np.fromfile(written, dtype="<i4", count=min(COPY_BYTES, self._documents - first))
                ends = np.cumsum(sizes, dtype="<i8") * self._dtype.itemsize + pointer
                self._idx.write((ends - sizes.astype("<i8") * self._dtype.itemsize).tobytes())
                pointer = int(ends[-1])
        for first in range(0, self._documents + 1, COPY_BYTES):
            self._idx.write(
                np.arange(first, min(first + COPY_BYTES, self._documents + 1), dtype="<i8").tobytes()
            )
        self._idx.seek(0)
        self._idx.write(
            _HEADER.pack(MAGIC, VERSION, _CODES[self._dtype], self._documents, self._documents + 1)
        )
        _synced_close(self._idx)


def _synced_close(file) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


class IndexedReader:
    """A memory-mapped `.bin/.idx` pair.

    Opening reads only the header and the last entry; `check` reads the index. Raises UserError if a file is
    missing, empty, truncated or not in this format.
    """

    def __init__(self, prefix: Path) -> None:
        self.bin_path, self.idx_path = file_pair(prefix)
        for path in (self.bin_path, self.idx_path):
            if not path.is_file():
                raise _bad(path, "there is no such file")
            if path.stat().st_size == 0:
                raise _bad(path, "the file is empty")
        self.dtype, self.sequences, boundaries = self._header()
        self.documents = boundaries - 1
        index = np.memmap(self.idx_path, mode="r", dtype=np.uint8)
        cuts = np.cumsum([_HEADER.size, 4 * self.sequences, 8 * self.sequences])
        self.sizes: np.ndarray = index[cuts[0] : cuts[1]].view("<i4")
        """Tokens per sequence, int32 (sequences,), memory-mapped."""
        self.pointers: np.ndarray = index[cuts[1] : cuts[2]].view("<i8")
        """Byte offset of each sequence in the .bin file, int64 (sequences,), memory-mapped."""
        self.first_sequences: np.ndarray = index[cuts[2] : cuts[2] + 8 * boundaries].view("<i8")
        """First sequence of each document, then the number of sequences: int64
        (documents + 1,), memory-mapped."""
        end = int(self.pointers[-1]) + int(self.sizes[-1]) * self.dtype.itemsize
        size = self.bin_path.stat().st_size
        if size != end:
            raise _bad(
                self.bin_path,
                (
                    f"it has {size} bytes but its index describes {end}; "
                    f"it is {'truncated' if size < end else 'of another index'}"
                ),
            )
        self.tokens = size // self.dtype.itemsize
        self._tokens = np.memmap(self.bin_path, mode="r", dtype=self.dtype)

    def _header(self) -> tuple[np.dtype, int, int]:
        with self.idx_path.open("rb") as file:
            head = file.read(_HEADER.size)
        if head[: len(MAGIC)] != MAGIC:
            raise _bad(self.idx_path, f"it starts with {head[:9]!r}, so it is no token index")
        if len(head) < _HEADER.size:
            raise _bad(self.idx_path, f"it is truncated after {len(head)} bytes")
        _, version, code, sequences, boundaries = _HEADER.unpack(head)
        if version != VERSION:
            raise _bad(self.idx_path, f"it has format version {version}, not {VERSION}")
        if code not in _DTYPES:
            raise _bad(self.idx_path, f"its type code {code} is none of the integer types {sorted(_DTYPES)}")
        if sequences == 0:
            raise _bad(self.idx_path, "it holds no documents")
        if not 1 < boundaries <= sequences + 1:
            raise _bad(self.idx_path, f"it has {boundaries} document boundaries for {sequences} sequences")
        need, size = _HEADER.size + 12 * sequences + 8 * boundaries, self.idx_path.stat().st_size
        if size < need:
            raise _bad(self.idx_path, f"it is truncated: {size} bytes of {need}")
        if size not in (need, need + sequences):  # Megatron adds a byte per sequence for multimodal data
            raise _bad(self.idx_path, f"it has {size} bytes, and its header describes {need}")
        return _DTYPES[code], sequences, boundaries

    def check(self) -> None:
        """Refuse an index whose entries are inconsistent (raises UserError).

        Reads the whole index, a few MB at a time.
        """
        pointer, item = 0, self.dtype.itemsize
        for first in range(0, self.sequences, COPY_BYTES):
            part = slice(first, first + COPY_BYTES)
            bytes_each = self.sizes[part].astype(np.int64) * item
            ends = np.cumsum(bytes_each) + pointer
            wrong = np.flatnonzero((bytes_each < 0) | (self.pointers[part] != ends - bytes_each))
            if len(wrong):
                place = first + int(wrong[0])
                words = (
                    f"sequence {place} has {self.sizes[place]} tokens "
                    f"from byte {self.pointers[place]}, which does not follow the one before"
                )
                raise _bad(self.idx_path, words)
            pointer = int(ends[-1])
        last = 0
        for first in range(0, self.documents + 1, COPY_BYTES):
            bounds = self.first_sequences[first : first + COPY_BYTES].astype(np.int64)
            wrong = np.flatnonzero(np.diff(bounds, prepend=last) < 0)
            if len(wrong) or (first == 0 and bounds[0] != 0):
                place = first + (int(wrong[0]) if len(wrong) else 0)
                raise _bad(
                    self.idx_path,
                    (
                        f"document {place} begins at sequence {self.first_sequences[place]}, "
                        "before the one before it"
                    ),
                )
            last = int(bounds[-1])
        if last != self.sequences:
            raise _bad(self.idx_path, f"its documents end at sequence {last} of {self.sequences}")

    def check_not_zeros(self) -> None:
        """Refuse token files of which a sample is all zeros, as in an incomplete copy (raises UserError)."""
        starts = [self.tokens * part // _SAMPLES for part in range(_SAMPLES)]
        sample = np.concatenate(
            [self.read(start, min(start + _SAMPLE_TOKENS, self.tokens)) for start in starts]
        )
        if len(sample) > _SAMPLE_TOKENS and not sample.any():
            raise _bad(
                self.bin_path,
                (
                    f"all {len(sample)} tokens of a sample have the id 0: "
                    "the copy is incomplete, or it is no text"
                ),
            )

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the concatenated documents, in the file's dtype; a view
        of the memory-mapped file.
        """
        assert 0 <= start <= stop <= self.tokens
        return self._tokens[start:stop]

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Starts of documents in tokens [start, stop): ascending, unique int64 positions in the file.

        Reads a few dozen entries of the index, by bisection: np.searchsorted would copy
        the whole unaligned map.
        """
        first = bisect_left(range(self.documents), start, key=self._document_start)
        last = bisect_left(range(self.documents), stop, lo=first, key=self._document_start)
        return np.unique(
            np.array([self._document_start(document) for document in range(first, last)], dtype=np.int64)
        )

    def documents_in(self, start: int, stop: int) -> list[int]:
        """Numbers of the documents that have tokens in [start, stop)."""
        first = bisect_right(range(self.documents), start, key=self._document_start) - 1
        last = bisect_left(range(self.documents), stop, lo=first, key=self._document_start)
        return list(range(first, last))

    def _document_start(self, document: int) -> int:
        sequence = int(self.first_sequences[document])
        return (
            int(self.pointers[sequence]) // self.dtype.itemsize if sequence < self.sequences else self.tokens
        )


def _bad(path: Path, problem: str) -> UserError:
    return refusal(
        "data.path",
        path,
        problem,
        allowed="a complete pair of .bin and .idx token files",
        instead=prepare_command.for_folder(path.parent),
    )
