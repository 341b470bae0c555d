"""Rows from a user's Python object instead of token files.

    class Rows:
        def __len__(self): ...
        def row(self, index): ...            # token ids; or (token ids, loss mask: True for targets)

Order, resuming and distribution over ranks are the same as for a prepared corpus: the rank that trains on a
row fetches it by its index.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from hybridtrain.data.rows import Block
from hybridtrain.errors import refusal
from hybridtrain.types import IGNORE_INDEX

_SAMPLED = 256
"""Number of rows that are hashed if the data has no `fingerprint`."""


class UserRows:
    """A user's rows with the interface of data.corpus.Corpus: one split, no files."""

    facts = None
    packed = False
    vocab_size = eos_id = largest_id = sample = None

    def __init__(self, rows: Any, *, split: str, field: str) -> None:
        """`rows`: see above, or a sequence of mappings with `input_ids` and optionally `labels`, `loss_mask`
        or a class number `label`.

        `field`: for messages, the argument that `rows` was passed as, or data.kind=NAME. Raises UserError if
        `rows` has no length, no rows, or no access by index.
        """
        self.table, self.readers = rows, (split,)
        self.field, _, named = field.partition("=")
        self.path = named or type(rows).__name__
        if isinstance(rows, Mapping):
            allowed, instead = (
                "a sequence of rows, such as one of its splits",
                f"{self.field}[{next(iter(rows), 'train')!r}]",
            )
            raise refusal(
                self.field,
                self.path,
                f"it is a mapping of {', '.join(map(str, rows)) or 'nothing'}",
                allowed=allowed,
                instead=instead,
            )
        if not hasattr(rows, "__len__") or not (hasattr(rows, "row") or hasattr(rows, "__getitem__")):
            problem, allowed = (
                "it has no __len__, or neither row(index) nor [index]",
                "an object with __len__ and row(index), or a datasets.Dataset",
            )
            raise refusal(
                self.field, self.path, problem, allowed=allowed, instead="a class with these two methods"
            )
        if len(rows) == 0:
            raise refusal(
                self.field,
                self.path,
                "it has no rows",
                allowed="one row or more",
                instead="data of some length",
            )

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the number of rows and the data's own `fingerprint`; without that, over a
        sample of its rows.
        """
        digest = hashlib.sha256(f"own rows {len(self.table)}".encode())
        fingerprint = getattr(self.table, "fingerprint", None)
        if isinstance(fingerprint, str):
            digest.update(fingerprint.encode())
            return digest.hexdigest()
        count, sampled = len(self.table), min(_SAMPLED, len(self.table))
        for index in (number * count // sampled for number in range(sampled)):
            tokens, mask = self.read(index)
            digest.update(
                len(tokens).to_bytes(8, "little")
                + tokens.tobytes()
                + (b"" if mask is None else mask.tobytes())
            )
        return digest.hexdigest()

    def count(self, split: str, *, seq_len: int) -> int:  # noqa: ARG002 - not needed
        return len(self.table) if split in self.readers else 0

    @property
    def labelled(self) -> bool:
        """Whether its first row has a class number, which is the target of that row alone."""
        row = self.table.row(0) if hasattr(self.table, "row") else self._item(0)
        label = row.get("labels", row.get("label")) if isinstance(row, Mapping) else None
        return label is not None and np.ndim(label) == 0

    def has_targets(self, split: str, *, seq_len: int) -> bool:  # noqa: ARG002 - assumed
        return True

    def rows(self, split: str, *, seq_len: int, documents: bool, vocab: int) -> _Rows:
        assert split in self.readers
        return _Rows(self, seq_len=seq_len, documents=documents, vocab=vocab)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """(token ids, int64 (n,); loss mask, bool (n,), or None for all).

        Raises UserError for an invalid row.
        """
        row = self.table.row(index) if hasattr(self.table, "row") else self._item(index)
        tokens, mask = row if isinstance(row, tuple) and len(row) == 2 else (row, None)
        if isinstance(row, Mapping):
            row = self._without_padding(row, index)
            tokens, mask, labels = (
                row.get("input_ids"),
                row.get("loss_mask"),
                row.get("labels", row.get("label")),
            )
            if labels is not None and np.ndim(labels) == 0:  # a class: the target of the last token
                return self._labelled(tokens, labels, index)
            if mask is None and labels is not None:
                mask = np.asarray(labels) != IGNORE_INDEX
        ids = _array(tokens)
        if isinstance(row, Mapping) and tokens is None:
            allowed = "input_ids: the token ids, which a tokenizer makes of text"
            raise self._refusal(
                index, f"it has {', '.join(map(str, row))}, and no input_ids", allowed=allowed
            )
        if ids is None or len(ids) < 2:
            raise self._refusal(
                index, f"it is {_short(tokens)}", allowed="a sequence of two token ids or more"
            )
        loss_mask = None if mask is None else _array(mask)
        if mask is not None and (loss_mask is None or loss_mask.shape != ids.shape):
            raise self._refusal(
                index,
                f"it has {len(ids)} tokens, and its mask is {_short(mask)}",
                allowed="a mask with one value for each token",
            )
        return ids, None if loss_mask is None else loss_mask != 0

    def _item(self, index: int) -> Any:
        try:
            return self.table[index]
        except (KeyError, IndexError, TypeError) as error:
            problem = f"[{index}] raises {type(error).__name__}: {error}"
            raise self._refusal(index, problem, allowed="data that returns row i for [i]") from error

    def _without_padding(self, row: Mapping[str, Any], index: int) -> Mapping[str, Any]:
        """A mapping without the positions that its attention_mask rules out, which a tokenizer has padded."""
        attended, ids = _array(row.get("attention_mask")), _array(row.get("input_ids"))
        if attended is None or ids is None:
            return row
        [kept] = np.nonzero(attended)
        if attended.shape != ids.shape or (len(kept) and np.ptp(kept) + 1 != len(kept)):
            problem = f"it has {len(ids)} tokens, and its attention_mask is {_short(row['attention_mask'])}"
            raise self._refusal(
                index, problem, allowed="an attention_mask with one run of ones, for each token one value"
            )
        each = {name: row[name] for name in ("input_ids", "loss_mask", "labels") if row.get(name) is not None}
        return {**row, **{name: np.asarray(values)[kept] for name, values in each.items() if np.ndim(values)}}

    def _labelled(self, tokens: Any, label: Any, index: int) -> tuple[np.ndarray, np.ndarray]:
        """A row with one label for the whole text: (ids and label, loss mask of the label)."""
        ids = _array(tokens)
        if ids is None or not len(ids) or np.asarray(label).dtype.kind not in "iub":
            raise self._refusal(
                index,
                f"it is {_short(tokens)} with label {_short(label)}",
                allowed="token ids and the number of a class",
            )
        whole = np.append(ids, int(label))
        return whole, np.arange(len(whole)) == len(ids)

    def _refusal(self, index: int, problem: str, *, allowed: str) -> Exception:
        return refusal(
            self.field, f"{self.path}, row {index}", problem, allowed=allowed, instead="other rows"
        )


class _Rows:
    """Rows padded to one length; longer ones are refused."""

    masked = True

    def __init__(self, data: UserRows, *, seq_len: int, documents: bool, vocab: int) -> None:
        self._data, self._seq_len, self._documents, self._vocab = data, seq_len, documents, vocab
        self._rows = len(data.table)

    def __len__(self) -> int:
        return self._rows

    def gather(self, row_ids: np.ndarray) -> Block:
        block = Block.blank(
            len(row_ids), seq_len=self._seq_len, documents=self._documents, masked=True, pairs=False
        )
        assert block.loss_mask is not None
        for place, index in enumerate(int(row) for row in row_ids):
            tokens, mask = self._data.read(index)
            self._check(tokens, index)
            block.tokens[place, : len(tokens)] = tokens
            block.loss_mask[place, : len(tokens)] = True if mask is None else mask
            if block.doc_start is not None:
                # the padding is a document of its own
                block.doc_start[place, [0, *([len(tokens)] if len(tokens) <= self._seq_len else [])]] = True
        return block

    def documents(self, row: int) -> list[int]:  # noqa: ARG002 - a row is all that is known
        return []

    def _check(self, tokens: np.ndarray, index: int) -> None:
        if len(tokens) > self._seq_len + 1:
            problem = f"it has {len(tokens)} tokens, data.seq_len is {self._seq_len}"
            raise self._data._refusal(
                index, problem, allowed=f"up to data.seq_len + 1 = {self._seq_len + 1} tokens"
            )
        if tokens.min() < 0 or tokens.max() >= self._vocab:
            odd = int(tokens.min() if tokens.min() < 0 else tokens.max())
            raise self._data._refusal(
                index,
                f"it holds token id {odd}, the model has {self._vocab}",
                allowed=f"token ids of 0 to {self._vocab - 1}",
            )


def _array(values: Any) -> np.ndarray | None:
    """A sequence of integers as int64 (n,); None for anything else."""
    if isinstance(values, str | bytes) or not (isinstance(values, Sequence) or hasattr(values, "__array__")):
        return None
    try:
        array = np.asarray(values)
    except ValueError:
        return None
    return array.astype(np.int64) if array.ndim == 1 and array.dtype.kind in "iub" else None


def _short(value: Any) -> str:
    text = f"{type(value).__name__} {value!r}"
    return text if len(text) <= 80 else f"{text[:77]}..."
