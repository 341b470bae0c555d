"""A prepared corpus, and the micro-batches of one data rank. The global batch of a step is the same under every layout:

    samples  step * G ........................... step * G + G - 1        G = global_batch_size
             |  data rank 0  |  data rank 1  | ...                        contiguous blocks of G / dp
             | mb 0  | mb 1  |                                            cut in order into grad_accum micro-batches

Sample index to row is `order.row_ids`, so a step's rows follow from (seed, step) alone and there is no state to save.
Torch is imported where tensors are made: a corpus can be checked without it.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hybridtrain.data import order
from hybridtrain.data.corpus import FORMAT, READABLE
from hybridtrain.data.indexed import IndexedReader, file_pair
from hybridtrain.data.pack import Rows, count_rows
from hybridtrain.layout import BatchPlan
from hybridtrain.types import IGNORE_INDEX, Batch, UserError, refusal


@dataclass(frozen=True)
class Corpus:
    """A folder that `hybridtrain prepare` completed."""

    path: Path
    vocab_size: int
    """Entries of the tokenizer."""
    largest_id: int
    """Largest token id in the files."""
    eos_id: int | None
    fingerprint: str
    """sha256 over tokens, document sizes and tokenizer facts."""
    readers: dict[str, IndexedReader]
    """Token files by split; a split without documents has none."""

    @property
    def tokenizer_dir(self) -> Path:
        return self.path / "tokenizer"

    @classmethod
    def open(cls, path: str | Path) -> Corpus:
        """Open a prepared folder, reading metadata only.

        Raises UserError when it is not prepared, or when a token file is missing, empty, truncated or of another size
        than corpus.json says.
        """
        folder = Path(path).expanduser()
        facts = _facts(folder)
        try:
            if facts["format"] not in READABLE:
                raise _unprepared(folder, f"it has format {facts['format']}, this version reads {FORMAT}")
            counts = {split: (facts["splits"][split]["documents"], facts["splits"][split]["tokens"]) for split in ("train", "eval")}
            named = {name: facts[name] for name in ("vocab_size", "largest_id", "eos_id", "fingerprint")}
        except (KeyError, TypeError) as error:
            raise _unprepared(folder, f"its corpus.json lacks {error}") from error
        readers = {split: IndexedReader(folder / split) for split, (documents, _) in counts.items() if documents}
        for split, reader in readers.items():
            if (reader.documents, reader.tokens) != counts[split]:
                found = f"{reader.documents} documents and {reader.tokens} tokens"
                raise _unprepared(folder, f"{file_pair(folder / split)[0]} has {found}, corpus.json says {counts[split][0]} and {counts[split][1]}")
        return cls(path=folder, readers=readers, **named)

    def rows(self, split: str, *, seq_len: int) -> int:
        """Whole rows of `seq_len` in a split; 0 for a split without documents."""
        return count_rows(self.readers[split].tokens, seq_len=seq_len) if split in self.readers else 0


def _facts(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise _unprepared(folder, "there is no such folder")
    try:
        return json.loads((folder / "corpus.json").read_text())
    except FileNotFoundError:
        if file_pair(folder / "train")[1].exists():
            raise _unprepared(folder, "it has token files but no corpus.json; token files of other makers cannot be used as they are yet") from None
        raise _unprepared(folder, "it holds no prepared corpus") from None
    except ValueError as error:
        raise _unprepared(folder, f"its corpus.json cannot be read ({error})") from error


def _unprepared(folder: Path, problem: str) -> UserError:
    return refusal(
        "data.path",
        folder,
        problem,
        allowed="a folder that prepare completed",
        instead=f"hybridtrain prepare data.path={folder} data.source=[stdlib] (or your own text), with prepare.overwrite=true if it holds something",
    )


def check_vocab(corpus: Corpus, *, vocab: int) -> None:
    """Refuse token ids that the model has no embedding for."""
    if corpus.largest_id >= vocab:
        raise refusal(
            "model.config.vocab_size",
            vocab,
            f"{corpus.path} holds token id {corpus.largest_id}",
            allowed=f"{corpus.largest_id + 1} or more (its tokenizer has {corpus.vocab_size})",
            instead=f"model.config.vocab_size={max(corpus.vocab_size, corpus.largest_id + 1)}, or text prepared with the model's own tokenizer",
        )


def _known(tokens: np.ndarray, *, corpus: Corpus) -> np.ndarray:
    """The tokens, if corpus.json knows of ids as large as theirs: one beyond the embedding would crash, on a GPU without saying why."""
    largest = int(tokens.max(initial=0))
    if largest > corpus.largest_id:
        raise _unprepared(corpus.path, f"token id {largest} was read from it, but the largest that prepare wrote is {corpus.largest_id}; a file has changed")
    return tokens


class Loader:
    """The training micro-batches of one data rank, by step. The next step's rows are read while this one is computed."""

    def __init__(self, corpus: Corpus, *, plan: BatchPlan, dp_rank: int, dp_size: int, seed: int) -> None:
        assert plan.global_batch_size == plan.micro_batch_size * plan.grad_accum * dp_size
        assert 0 <= dp_rank < dp_size
        self._corpus = corpus
        self._rows = Rows(corpus.readers["train"], seq_len=plan.seq_len)
        self._plan = plan
        self._seed = seed
        self._share = plan.global_batch_size // dp_size
        self._offset = dp_rank * self._share
        identity = f"{corpus.fingerprint} seq_len={plan.seq_len} seed={seed} global_batch_size={plan.global_batch_size}"
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        """Identity of the token order: equal fingerprints see the same tokens at the same step."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rows")
        self._ahead: tuple[int, Future[np.ndarray]] | None = None

    @property
    def rows_per_epoch(self) -> int:
        return len(self._rows)

    def row_ids(self, step: int) -> np.ndarray:
        """Rows of this rank in `step`, in order: int64 (global_batch_size / dp,)."""
        first = step * self._plan.global_batch_size + self._offset
        return order.row_ids(first, self._share, rows=len(self._rows), seed=self._seed)

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's grad_accum micro-batches of optimizer step `step` (from 0), each (micro_batch_size, seq_len) on the CPU."""
        tokens = self._ahead[1].result() if self._ahead and self._ahead[0] == step else self._read(step)
        self._ahead = (step + 1, self._thread.submit(self._read, step + 1))
        return _cut(tokens, valid=len(tokens), size=self._plan.micro_batch_size)

    def _read(self, step: int) -> np.ndarray:
        return _known(self._rows.gather(self.row_ids(step)), corpus=self._corpus)


def eval_batches(corpus: Corpus, *, plan: BatchPlan, rows: int, dp_rank: int, dp_size: int, micro_batches_per_step: int) -> list[list[Batch]]:
    """`rows` held-out rows (all, if there are fewer), evenly spread so that no document stands for all, in steps of micro-batches.

    Every rank gets the same number of steps, each of `micro_batches_per_step` batches. Rows missing at the end are
    filled with rows whose labels are all IGNORE_INDEX, so that the sum of token losses is exact.
    """
    assert rows >= 1
    if corpus.rows("eval", seq_len=plan.seq_len) == 0:
        raise refusal(
            "train.eval_rows",
            rows,
            f"{corpus.path} holds no held-out row of {plan.seq_len} tokens",
            allowed="a corpus with held-out documents",
            instead="train.eval_every=0, or prepare with a larger data.eval_fraction",
        )
    held_out = Rows(corpus.readers["eval"], seq_len=plan.seq_len)
    rows = min(rows, len(held_out))
    chosen = np.arange(rows) * len(held_out) // rows
    share = plan.micro_batch_size * micro_batches_per_step
    steps = []
    for first in range(0, rows, share * dp_size):
        start = min(first + dp_rank * share, rows)
        tokens = np.zeros((share, plan.seq_len + 1), dtype=np.int64)
        valid = min(share, rows - start)
        tokens[:valid] = _known(held_out.gather(chosen[start : start + valid]), corpus=corpus)
        steps.append(_cut(tokens, valid=valid, size=plan.micro_batch_size))
    return steps


def _cut(tokens: np.ndarray, *, valid: int, size: int) -> list[Batch]:
    """Rows (n, T + 1) to batches of `size` rows: inputs, labels shifted by one; rows from `valid` on carry no loss."""
    import torch

    rows = torch.from_numpy(tokens)
    inputs, labels = rows[:, :-1], rows[:, 1:].clone()
    labels[valid:] = IGNORE_INDEX
    positions = torch.arange(inputs.shape[1]).repeat(size, 1)
    return [
        Batch(input_ids_BT=inputs[at : at + size].contiguous(), labels_BT=labels[at : at + size], position_ids_BT=positions)
        for at in range(0, len(tokens), size)
    ]
