"""Random tokens in place of a corpus: a comparison or a benchmark needs no text."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from hybridtrain.data.loader import Collate
from hybridtrain.data.rows import Block
from hybridtrain.plan.batch import BatchPlan
from hybridtrain.types import Batch


class Tokens(Protocol):
    """A source of this data rank's micro-batches by step: a corpus' Loader, or Synthetic."""

    def micro_batches(self, step: int) -> list[Batch]: ...


class Synthetic:
    """Uniformly random tokens from (seed, step), cut like the Loader cuts rows of a corpus. `labels`: number of classes; the last token of a row is its class then (0: no classes)."""

    def __init__(self, *, vocab: int, plan: BatchPlan, dp_rank: int, dp_size: int, seed: int, labels: int, collate: Collate) -> None:
        self.vocab, self.plan, self.seed, self.labels, self.collate = vocab, plan, seed, labels, collate
        share = plan.global_batch_size // dp_size
        self.rows = range(dp_rank * share, (dp_rank + 1) * share, plan.micro_batch_size)

    def micro_batches(self, step: int) -> list[Batch]:
        generator = torch.Generator().manual_seed((self.seed << 20) + step)
        tokens = torch.randint(0, self.vocab, (self.plan.global_batch_size, self.plan.seq_len + 1), generator=generator)
        carries = None
        if self.labels:
            tokens[:, -1] %= self.labels
            carries = np.zeros(tokens.shape, dtype=bool)
            carries[:, -1] = True
        size, found = self.plan.micro_batch_size, []
        for row in self.rows:
            rows = slice(row, row + size)
            block = Block(tokens[rows].numpy(), None, None if carries is None else carries[rows])
            found.append(self.collate(block, valid=size))
        return found
