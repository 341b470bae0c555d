"""Random tokens instead of a corpus, for comparisons and benchmarks."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from hybridtrain.data.loader import Collate, micro_batches, samples
from hybridtrain.data.order import keys
from hybridtrain.data.rows import Block
from hybridtrain.plan.batch import BatchPlan
from hybridtrain.types import Batch


class Tokens(Protocol):
    """Micro-batches of this data rank by step: a Loader of a corpus, or Synthetic."""

    def micro_batches(self, step: int) -> list[Batch]: ...


class Synthetic:
    """Uniformly random tokens from (seed, step), divided among ranks like rows of a corpus.

    `labels`: number of classes; if not 0, the last token of a row is its class.
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
        collate: Collate,
    ) -> None:
        self.vocab, self.plan, self.seed, self.labels, self.collate = vocab, plan, seed, labels, collate
        self.dp_rank, self.dp_size = dp_rank, dp_size

    def micro_batches(self, step: int) -> list[Batch]:
        generator = torch.Generator().manual_seed((self.seed << 20) + step)
        rows = self.plan.rows_at(step)
        tokens = torch.randint(0, self.vocab, (rows, self.plan.seq_len + 1), generator=generator)
        loss_mask = None
        if self.labels:
            tokens[:, -1] %= self.labels
            loss_mask = np.zeros(tokens.shape, dtype=bool)
            loss_mask[:, -1] = True
        chosen = samples(step, plan=self.plan, dp_rank=self.dp_rank, dp_size=self.dp_size)
        mine = chosen - self.plan.rows_before(step)
        block = Block(tokens[mine].numpy(), None, None if loss_mask is None else loss_mask[mine])
        keys_B = keys(chosen, pieces=self.plan.pieces_at(step), seed=self.seed)
        return micro_batches(block, plan=self.plan, step=step, keys_B=keys_B, collate=self.collate)
