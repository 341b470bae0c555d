"""The batch of an optimizer step: how many micro-batches each data rank takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridtrain.plan import rules

if TYPE_CHECKING:
    from hybridtrain.config import schema
    from hybridtrain.plan.layout import ParallelLayout


@dataclass(frozen=True)
class BatchPlan:
    """global_batch_size = micro_batch_size x dp x grad_accum. Under pp, grad_accum is the number of micro-batches."""

    micro_batch_size: int
    seq_len: int
    grad_accum: int
    global_batch_size: int

    @property
    def tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.global_batch_size * self.seq_len


def plan_batch(batch: schema.BatchConfig, *, layout: ParallelLayout, seq_len: int) -> BatchPlan:
    """Derive grad_accum; raises UserError for a global batch that does not divide."""
    rules.require(rules.of_batch(batch, dp=layout.dp, seq_len=seq_len))
    return BatchPlan(batch.micro_batch_size, seq_len, batch.global_batch_size // (batch.micro_batch_size * layout.dp), batch.global_batch_size)
