"""Rows of S + 1 tokens from documents: the first S are inputs, the last S labels.

    TextRows   row i is tokens [i*S, i*S + S] of the concatenated documents: all but the first are labels once
    ChatRows   whole conversations, packed into rows by `prepare` (packing.py); the rest of a row is padding

End-of-text tokens are in the file already; a text row is one slice of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from hybridtrain.data.indexed import IndexedReader
from hybridtrain.errors import refusal
from hybridtrain.runtime import hashing

Check = Callable[[np.ndarray], None]
"""Raises UserError for token ids that the model does not have."""


@dataclass(frozen=True)
class Block:
    """Several rows; arrays of shape (n, S + 1)."""

    tokens: np.ndarray
    """int64."""
    doc_start: np.ndarray | None
    """bool: True where a document starts; None: rows are not divided into documents."""
    loss_mask: np.ndarray | None
    """bool: True where the token is a training target; None: all are."""
    keys: np.ndarray | None = None
    """uint64 (n,): a random number for each sample (hashing.keys), for tasks that draw from it."""
    continues: np.ndarray | None = None
    """bool: True where the token continues the word of the one before it; None: not known."""
    segments: np.ndarray | None = None
    """Of pairs (pairs.py): int8, 0 in the first part, 1 in the second, which follows it, -1 elsewhere."""
    unrelated: np.ndarray | None = None
    """Of pairs: bool (n,), whether the second part is of another document."""
    marks: np.ndarray | None = None
    """With a loss_mask: uint8, what is stored for each token: 0 for no target, for labels of words the class
    of the token before it + 1; 0 in rows of a program."""

    @classmethod
    def blank(cls, rows: int, *, seq_len: int, documents: bool, masked: bool, pairs: bool) -> Block:
        """Rows of token 0, without document starts or targets.

        `documents`, `masked`, `pairs`: with these arrays, not None.
        """
        shape = (rows, seq_len + 1)
        return cls(
            np.zeros(shape, dtype=np.int64),
            np.zeros(shape, dtype=bool) if documents else None,
            np.zeros(shape, dtype=bool) if masked else None,
            segments=np.full(shape, -1, dtype=np.int8) if pairs else None,
            unrelated=np.zeros(rows, dtype=bool) if pairs else None,
            marks=np.zeros(shape, dtype=np.uint8) if masked else None,
        )

    def cut(self, pieces: int) -> Block:
        """Each row as `pieces` rows of S / pieces + 1 tokens: the last token of a piece is the first of the
        next one, so that each target stays one."""
        if pieces == 1:
            return self
        length = (self.tokens.shape[1] - 1) // pieces
        chosen = np.arange(pieces)[:, None] * length + np.arange(length + 1)
        start, mask = (
            None if array is None else array[:, chosen].reshape(-1, length + 1)
            for array in (self.doc_start, self.loss_mask)
        )
        continues = None if self.continues is None else self.continues[:, chosen].reshape(-1, length + 1)
        keys = None
        if self.keys is not None:
            keys = hashing.bits(self.keys[:, None], np.arange(pieces), purpose=0).flatten()
        return Block(self.tokens[:, chosen].reshape(-1, length + 1), start, mask, keys, continues)

    def with_words(self, continuing: np.ndarray | None) -> Block:
        """With `continues`, if `continuing` tells of each token whether it continues a word."""
        if continuing is None:
            return self
        known = np.minimum(self.tokens, len(continuing) - 1)  # tokens added later are words
        return replace(self, continues=continuing[known] & (self.tokens < len(continuing)))

    def put(self, places: np.ndarray, other: Block) -> None:
        """Write the rows of `other` into rows `places`."""
        self.tokens[places] = other.tokens
        if self.doc_start is not None:
            assert other.doc_start is not None
            self.doc_start[places] = other.doc_start
        if self.loss_mask is not None:
            self.loss_mask[places] = True if other.loss_mask is None else other.loss_mask
        if self.marks is not None and other.marks is not None:
            self.marks[places] = other.marks
        if self.segments is not None:
            assert self.unrelated is not None
            self.segments[places], self.unrelated[places] = other.segments, other.unrelated


class Rows(Protocol):
    """The rows of one split of a corpus, with a fixed length."""

    masked: bool
    """Whether its blocks have a loss_mask."""

    def __len__(self) -> int: ...

    def gather(self, row_ids: np.ndarray) -> Block:
        """The rows `row_ids`, int64 (n,). Reads only these rows from the file."""

    def documents(self, row: int) -> list[int]:
        """Numbers of the documents in a row; empty if the rows are not made of documents."""


def count_rows(tokens: int, *, seq_len: int) -> int:
    """Number of whole rows in a stream of `tokens` tokens; the rest is not used."""
    return max(0, tokens - 1) // seq_len


class TextRows:
    """Slices of the token stream; with `documents` their blocks have doc_start, from the index."""

    masked = False

    def __init__(self, reader: IndexedReader, *, seq_len: int, documents: bool, check: Check) -> None:
        self._reader, self._seq_len, self._documents, self._check = reader, seq_len, documents, check
        self._rows = count_rows(reader.tokens, seq_len=seq_len)
        if self._rows == 0:
            raise refusal(
                "data.seq_len",
                seq_len,
                (
                    f"{reader.bin_path} has {reader.tokens} tokens, "
                    f"fewer than one row of {seq_len} and the token that follows"
                ),
                allowed=f"1 to {max(1, reader.tokens - 1)}",
                instead="a smaller data.seq_len, or more text",
            )

    def __len__(self) -> int:
        return self._rows

    def gather(self, row_ids: np.ndarray) -> Block:
        block = Block.blank(
            len(row_ids), seq_len=self._seq_len, documents=self._documents, masked=False, pairs=False
        )
        for place, row in enumerate(row_ids):
            start = int(row) * self._seq_len
            stop = start + self._seq_len + 1
            block.tokens[place] = self._reader.read(start, stop)
            if block.doc_start is not None:
                block.doc_start[place, self._reader.document_starts(start, stop) - start] = True
        self._check(block.tokens)
        return block

    def documents(self, row: int) -> list[int]:
        return self._reader.documents_in(row * self._seq_len, (row + 1) * self._seq_len + 1)


class ChatRows:
    """Conversations one after the other, each a document, truncated if longer than a row.

    Only some tokens are targets.
    """

    masked = True

    def __init__(
        self,
        reader: IndexedReader,
        loss: IndexedReader,
        *,
        ids: np.ndarray,
        starts: np.ndarray,
        seq_len: int,
        check: Check,
    ) -> None:
        """`ids`, `starts`: the row index of packing.py; `loss`: the loss masks of the tokens in `reader`."""
        self._reader, self._loss, self._ids, self._starts, self._seq_len, self._check = (
            reader,
            loss,
            ids,
            starts,
            seq_len,
            check,
        )

    def __len__(self) -> int:
        return len(self._starts) - 1

    def gather(self, row_ids: np.ndarray) -> Block:
        block = Block.blank(len(row_ids), seq_len=self._seq_len, documents=True, masked=True, pairs=False)
        assert block.doc_start is not None
        assert block.loss_mask is not None
        assert block.marks is not None
        for place, row in enumerate(row_ids):
            at = 0
            for conversation in self._ids[self._starts[row] : self._starts[row + 1]]:
                start = int(self._reader.pointers[conversation]) // self._reader.dtype.itemsize
                stop = start + min(int(self._reader.sizes[conversation]), self._seq_len + 1)
                here = slice(at, at + stop - start)
                block.tokens[place, here] = self._reader.read(start, stop)
                block.marks[place, here] = self._loss.read(start, stop)
                block.doc_start[place, at] = True
                at = here.stop
            block.doc_start[place, at : at + 1] = True  # the padding
        np.not_equal(block.marks, 0, out=block.loss_mask)
        self._check(block.tokens)
        return block

    def documents(self, row: int) -> list[int]:
        return [int(number) for number in self._ids[self._starts[row] : self._starts[row + 1]]]
