"""Random tokens instead of a corpus, for comparisons and benchmarks."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from hybridtrain.data.loader import Collate, micro_batches
from hybridtrain.data.rows import Block
from hybridtrain.plan.batch import BatchPlan
from hybridtrain.runtime import hashing
from hybridtrain.types import ANSWER_FIRST, ANSWER_LAST, SECOND_SEGMENT, Batch


class Tokens(Protocol):
    """Micro-batches of this data rank by step: a Loader of a corpus, or Synthetic."""

    def micro_batches(self, step: int) -> list[Batch]: ...


class Synthetic:
    """Uniformly random tokens from (seed, step), divided among ranks like rows of a corpus.

    `labels`: number of classes; if not 0, the last token of a row is its class. `head`: with "tokens" each
    token has one; with "answers" a row has an answer.
    """

    def __init__(
        self,
        *,
        vocab: int,
        plan: BatchPlan,
        dp_rank: int,
        dp_size: int,
        seed: int,
        labels: int,
        head: str,
        collate: Collate,
    ) -> None:
        self.vocab, self.plan, self.seed, self.labels, self.collate = vocab, plan, seed, labels, collate
        self.dp_rank, self.dp_size, self.head = dp_rank, dp_size, head

    def micro_batches(self, step: int) -> list[Batch]:
        generator = torch.Generator().manual_seed((self.seed << 20) + step)
        rows = self.plan.rows_at(step)
        tokens = torch.randint(0, self.vocab, (rows, self.plan.seq_len + 1), generator=generator)
        loss_mask = None
        marks = None
        if self.labels:
            loss_mask = np.full(tokens.shape, bool(self.head))
            loss_mask[:, -1] = True
            if self.head == "tokens":
                marks = tokens.numpy() % self.labels + 1
            elif self.head:
                marks = _answers(tokens.numpy())
            else:
                tokens[:, -1] %= self.labels
        share = rows // self.dp_size
        mine = slice(self.dp_rank * share, (self.dp_rank + 1) * share)
        keys = hashing.keys(
            np.arange(rows) + self.plan.rows_before(step), name=f"hybridtrain random tokens {self.seed}"
        )
        mask = None if loss_mask is None else loss_mask[mine]
        marks = None if marks is None else marks[mine]
        block = Block(tokens[mine].numpy(), None, mask, keys[mine], marks=marks)
        return micro_batches(block, plan=self.plan, step=step, collate=self.collate)


def _answers(tokens: np.ndarray) -> np.ndarray:
    """Marks of answers of up to 3 tokens, in rows whose second half is the second segment."""
    length = tokens.shape[1] - 1
    rows, first = np.arange(len(tokens)), 1 + tokens[:, 0] % length
    last = np.minimum(first + tokens[:, 1] % 3, length)
    marks = SECOND_SEGMENT * (np.arange(length + 1) > length // 2) * np.ones_like(tokens)
    marks[rows, first] |= ANSWER_FIRST
    marks[rows, last] |= ANSWER_LAST
    return marks
