"""The micro-batches of one data rank. The global batch of a step is the same under every layout:

    samples  step * G ........................... step * G + G - 1        G = global_batch_size
             |  data rank 0  |  data rank 1  | ...                        contiguous blocks of G / dp
             | mb 0  | mb 1  |                                            cut in order into grad_accum
                                                                          micro-batches

Where the batch grows with the step (plan.batch), the first sample is the sum of the batches before.

Sample index to row is `blend.sample_to_row`, so a step's rows follow from (seed, step) alone and
there is no state to save, except the number of samples that a rollback has left out: later
samples move up in their place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch

from hybridtrain.data.blend import Blend, largest_remainder, sample_to_row
from hybridtrain.data.compatibility import check_eval_rows
from hybridtrain.data.pairs import PairRows
from hybridtrain.data.rows import Block, Rows
from hybridtrain.plan.batch import BatchPlan
from hybridtrain.runtime import hashing
from hybridtrain.types import Batch


class Collate(Protocol):
    """See tasks.task.Task.collate."""

    def __call__(self, block: Block, *, valid: int) -> Batch: ...


class Loader:
    """The training micro-batches of one data rank, by step.

    The next step's batches are made while this one is computed.
    """

    def __init__(
        self,
        blend: Blend,
        *,
        plan: BatchPlan,
        dp_rank: int,
        dp_size: int,
        seed: int,
        vocab: int,
        collate: Collate,
    ) -> None:
        assert plan.global_batch_size == plan.micro_batch_size * plan.grad_accum * dp_size
        assert 0 <= dp_rank < dp_size
        self._rows = blend.rows("train", seq_len=plan.seq_len, vocab=vocab)
        self._quotas = blend.quotas
        self._documents, self._continuing = blend.documents, blend.continuing
        self._plan, self._collate = plan, collate
        self._seed = seed
        self.left_out = 0
        """Samples that are left out before the next step."""
        self._names = [str(corpus.path) for corpus, _ in blend.parts("train")]
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rows")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def row_ids(self, step: int) -> np.ndarray:
        """Rows of this rank in `step`, in order, as (corpus, row in it): int64 (rows of the step / dp, 2)."""
        rows = [len(rows) for rows in self._rows]
        return sample_to_row(self._samples(step), quotas=self._quotas, rows=rows, seed=self._seed)

    def _samples(self, step: int) -> np.ndarray:
        share = self._plan.rows_at(step) // self._dp_size
        first = self._plan.rows_before(step) + self.left_out + self._dp_rank * share
        return np.arange(first, first + share, dtype=np.int64)

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of optimizer step `step` (from 0), on the CPU: grad_accum of
        (micro_batch_size, seq_len), where the batch does not grow."""
        batches = self._ahead[1].result() if self._ahead and self._ahead[0] == step else self._read(step)
        self._ahead = (step + 1, self._thread.submit(self._read, step + 1))
        return batches

    def leave_out(self, samples: int) -> None:
        """Let the steps from now on read the data that come `samples` samples later."""
        if self._ahead:
            self._ahead[1].result()
        self._ahead, self.left_out = None, self.left_out + samples

    def sources(
        self, step: int, *, micro_batch: int, rows: Sequence[int]
    ) -> list[tuple[str, int, list[int]]]:
        """(corpus, row in it, its documents) of rows of one of this rank's micro-batches."""
        pieces, chosen = self._plan.pieces_at(step), self.row_ids(step)
        first = micro_batch * self._plan.micro_batch_size
        found = []
        for place in dict.fromkeys(first + row // pieces for row in rows):
            corpus, row = (int(value) for value in chosen[place])
            found.append((self._names[corpus], row, self._rows[corpus].documents(row)))
        return found

    def _read(self, step: int) -> list[Batch]:
        plan, chosen = self._plan, self.row_ids(step)
        keys = hashing.keys(self._samples(step), name=f"hybridtrain samples {self._seed}")
        block = _gather(self._rows, chosen, keys, seq_len=plan.seq_len, documents=self._documents)
        block = block.with_words(self._continuing)
        return micro_batches(block, plan=plan, step=step, collate=self._collate)


def micro_batches(block: Block, *, plan: BatchPlan, step: int, collate: Collate) -> list[Batch]:
    """The micro-batches of a data rank's rows in `step`."""
    pieces = plan.pieces_at(step)
    block = block.cut(pieces)
    return _cut(collate(block, valid=len(block.tokens)), size=plan.micro_batch_size * pieces)


def eval_batches(
    blend: Blend,
    *,
    plan: BatchPlan,
    rows: int,
    dp_rank: int,
    dp_size: int,
    micro_batches_per_step: int,
    vocab: int,
    collate: Collate,
) -> list[list[Batch]]:
    """`rows` held-out rows (all, if there are fewer), evenly spread so that no document stands for all, in
    steps of micro-batches.

    Of a blend, each corpus gives its share of the rows. Every rank gets the same number of steps, each of
    `micro_batches_per_step` batches. Rows missing at the end are filled with rows that the task does not
    count, so that its sums are exact.
    """
    assert rows >= 1
    check_eval_rows(blend, seq_len=plan.seq_len, field="train.eval_rows", value=rows)
    parts = [part for part in blend.parts("eval") if part[0].count("eval", seq_len=plan.seq_len)]
    held_out = [
        corpus.rows("eval", seq_len=plan.seq_len, documents=blend.documents, vocab=vocab)
        for corpus, _ in parts
    ]
    taken = [
        min(share, len(has))
        for share, has in zip(largest_remainder(rows, [weight for _, weight in parts]), held_out, strict=True)
    ]
    chosen = np.concatenate(
        [_spread(count, number=number, rows=len(held_out[number])) for number, count in enumerate(taken)]
    )
    share = plan.micro_batch_size * micro_batches_per_step
    steps = []
    for first in range(0, len(chosen), share * dp_size):
        mine = chosen[first + dp_rank * share :][:share]
        keys = np.zeros(share, dtype=np.uint64)  # for a row the same in every evaluation
        keys[: len(mine)] = hashing.keys(mine[:, 1], name="hybridtrain evaluation")
        block = _gather(held_out, mine, keys, seq_len=plan.seq_len, documents=blend.documents)
        block = block.with_words(blend.continuing)
        steps.append(_cut(collate(block, valid=len(mine)), size=plan.micro_batch_size))
    return steps


def _spread(count: int, *, number: int, rows: int) -> np.ndarray:
    """`count` of the rows of corpus `number`, evenly spread: (corpus, row), int64 (count, 2)."""
    ids = np.arange(count) * rows // max(1, count)
    return np.stack([np.full_like(ids, number), ids], axis=1)


def _gather(
    parts: Sequence[Rows | PairRows], chosen: np.ndarray, keys: np.ndarray, *, seq_len: int, documents: bool
) -> Block:
    """The chosen (corpus, row) pairs, in order, in a block of as many rows as there are keys; what is left
    over is blank.
    """
    masked = any(part.masked for part in parts)
    pairs = any(isinstance(part, PairRows) for part in parts)
    block = Block.blank(len(keys), seq_len=seq_len, documents=documents, masked=masked, pairs=pairs)
    block = dataclasses.replace(block, keys=keys)
    for number, part in enumerate(parts):
        places = np.flatnonzero(chosen[:, 0] == number)
        if len(places):
            ids = chosen[places, 1]
            if isinstance(part, PairRows):
                block.put(places, part.pairs(ids, keys=keys[places]))
            else:
                block.put(places, part.gather(ids))
    return block


def _cut(batch: Batch, *, size: int) -> list[Batch]:
    """Micro-batches of `size` rows, in memory from which a GPU copies while it computes; without
    a GPU, as they are."""
    if torch.cuda.is_available():
        batch = batch.map(lambda tensor: tensor.pin_memory())
    return [batch.rows(at, at + size) for at in range(0, len(batch.input_ids_BT), size)]
