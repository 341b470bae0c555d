"""Random tokens in place of a corpus: a comparison or a benchmark needs no text."""

from __future__ import annotations

from typing import Protocol

import torch

from hybridtrain.plan.batch import BatchPlan
from hybridtrain.types import Batch


class Tokens(Protocol):
    """A source of this data rank's micro-batches by step: a corpus' Loader, or Synthetic."""

    def micro_batches(self, step: int) -> list[Batch]: ...


class Synthetic:
    """Uniformly random tokens from (seed, step), cut like the Loader cuts rows of a corpus."""

    def __init__(self, *, vocab: int, plan: BatchPlan, dp_rank: int, dp_size: int, seed: int) -> None:
        self.vocab, self.plan, self.seed = vocab, plan, seed
        share = plan.global_batch_size // dp_size
        self.rows = range(dp_rank * share, (dp_rank + 1) * share, plan.micro_batch_size)

    def micro_batches(self, step: int) -> list[Batch]:
        generator = torch.Generator().manual_seed((self.seed << 20) + step)
        tokens = torch.randint(0, self.vocab, (self.plan.global_batch_size, self.plan.seq_len + 1), generator=generator)
        size = self.plan.micro_batch_size
        positions_BT = torch.arange(self.plan.seq_len).repeat(size, 1)
        return [Batch(tokens[row : row + size, :-1].contiguous(), tokens[row : row + size, 1:].contiguous(), positions_BT) for row in self.rows]
