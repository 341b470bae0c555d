"""Documents to rows: row i is tokens [i*S, i*S + S] of the concatenated documents, S + 1 tokens.

Inputs are the first S, labels the last S, so every token but the first is predicted exactly once per epoch. `prepare`
wrote the end-of-text tokens; a row is one slice of the file.
"""

from __future__ import annotations

import numpy as np

from hybridtrain.data.indexed import IndexedReader
from hybridtrain.types import refusal


def count_rows(tokens: int, *, seq_len: int) -> int:
    """Whole rows in a stream of `tokens`; the rest at the end is not used."""
    return max(0, tokens - 1) // seq_len


class Rows:
    """The rows of one split at one length."""

    def __init__(self, reader: IndexedReader, *, seq_len: int) -> None:
        self._reader = reader
        self._seq_len = seq_len
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

    def gather(self, row_ids: np.ndarray) -> np.ndarray:
        """Rows by id: int64 (len(row_ids), S + 1). Touches only the pages these rows lie on."""
        length = self._seq_len
        out = np.empty((len(row_ids), length + 1), dtype=np.int64)
        for place, row in zip(out, row_ids, strict=True):
            start = int(row) * length
            place[:] = self._reader.read(start, start + length + 1)
        return out
