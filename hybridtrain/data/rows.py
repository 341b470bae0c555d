"""Documents to rows of S + 1 tokens: inputs are the first S, labels the last S.

    TextRows   row i is tokens [i*S, i*S + S] of the concatenated documents: every token but the first is predicted once per epoch
    ChatRows   whole conversations, as `prepare` fitted them into rows (packing.py); the rest of a row is padding

`prepare` wrote the end-of-text tokens; a text row is one slice of the file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hybridtrain.data.indexed import IndexedReader
from hybridtrain.errors import refusal

Check = Callable[[np.ndarray], None]
"""Raises UserError for token ids that must not reach the model."""


@dataclass(frozen=True)
class Block:
    """Some rows. Arrays of shape (n, S + 1)."""

    tokens: np.ndarray
    """int64."""
    doc_start: np.ndarray | None
    """bool: a document begins here; None: rows are not cut into documents."""
    loss_mask: np.ndarray | None
    """bool: this token, as a target, carries loss; None: all do."""

    @classmethod
    def blank(cls, rows: int, *, seq_len: int, documents: bool, masked: bool) -> Block:
        """Rows of token 0; without documents, carrying no loss, where the block tells of such things."""
        shape = (rows, seq_len + 1)
        return cls(np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool) if documents else None, np.zeros(shape, dtype=bool) if masked else None)

    def cut(self, pieces: int) -> Block:
        """Each row as `pieces` rows of S / pieces + 1 tokens: the last token of a piece is the first of the next one, so that each target stays one."""
        rows, length = len(self.tokens), (self.tokens.shape[1] - 1) // pieces
        chosen = np.arange(pieces)[:, None] * length + np.arange(length + 1)
        of = lambda values: None if values is None else values[:, chosen].reshape(rows * pieces, length + 1)  # noqa: E731
        return self if pieces == 1 else Block(of(self.tokens), of(self.begins), of(self.carries))

    def put(self, places: np.ndarray, other: Block) -> None:
        """Write the rows of `other` into rows `places`."""
        self.tokens[places] = other.tokens
        if self.doc_start is not None:
            assert other.doc_start is not None
            self.doc_start[places] = other.doc_start
        if self.loss_mask is not None:
            self.loss_mask[places] = True if other.loss_mask is None else other.loss_mask


class Rows(Protocol):
    """The rows of one split of one corpus at one length."""

    masked: bool
    """Whether its blocks say which tokens carry loss."""

    def __len__(self) -> int: ...

    def gather(self, row_ids: np.ndarray) -> Block:
        """Rows by id, int64 (n,). Touches only the pages these rows lie on."""


def count_rows(tokens: int, *, seq_len: int) -> int:
    """Whole rows in a stream of `tokens`; the rest at the end is not used."""
    return max(0, tokens - 1) // seq_len


class TextRows:
    """Slices of the token stream; with `documents` they tell where documents begin, which the index knows."""

    masked = False

    def __init__(self, reader: IndexedReader, *, seq_len: int, documents: bool, check: Check) -> None:
        self._reader, self._seq_len, self._documents, self._check = reader, seq_len, documents, check
        self._rows = count_rows(reader.tokens, seq_len=seq_len)
        if self._rows == 0:
            raise refusal(
                "data.seq_len",
                seq_len,
                f"{reader.bin_path} has {reader.tokens} tokens, not one row of {seq_len} and the token that follows",
                allowed=f"1 to {max(1, reader.tokens - 1)}",
                instead="a smaller data.seq_len, or more text",
            )

    def __len__(self) -> int:
        return self._rows

    def gather(self, row_ids: np.ndarray) -> Block:
        block = Block.blank(len(row_ids), seq_len=self._seq_len, documents=self._documents, masked=False)
        for place, row in enumerate(row_ids):
            start = int(row) * self._seq_len
            stop = start + self._seq_len + 1
            block.tokens[place] = self._reader.read(start, stop)
            if block.doc_start is not None:
                block.doc_start[place, self._reader.document_starts(start, stop) - start] = True
        self._check(block.tokens)
        return block


class ChatRows:
    """Conversations side by side, each a document; one longer than a row is cut at the end. Only some tokens carry loss."""

    masked = True

    def __init__(self, reader: IndexedReader, loss: IndexedReader, *, ids: np.ndarray, starts: np.ndarray, seq_len: int, check: Check) -> None:
        """`ids`, `starts`: the row index that packing.py wrote; `loss`: a mask beside the tokens of `reader`."""
        self._reader, self._loss, self._ids, self._starts, self._seq_len, self._check = reader, loss, ids, starts, seq_len, check

    def __len__(self) -> int:
        return len(self._starts) - 1

    def gather(self, row_ids: np.ndarray) -> Block:
        block = Block.blank(len(row_ids), seq_len=self._seq_len, documents=True, masked=True)
        assert block.doc_start is not None
        assert block.loss_mask is not None
        for place, row in enumerate(row_ids):
            at = 0
            for conversation in self._ids[self._starts[row] : self._starts[row + 1]]:
                start = int(self._reader.pointers[conversation]) // self._reader.dtype.itemsize
                stop = start + min(int(self._reader.sizes[conversation]), self._seq_len + 1)
                here = slice(at, at + stop - start)
                block.tokens[place, here] = self._reader.read(start, stop)
                block.loss_mask[place, here] = self._loss.read(start, stop)
                block.doc_start[place, at] = True
                at = here.stop
            block.doc_start[place, at : at + 1] = True  # the padding
        self._check(block.tokens)
        return block
