"""What a task decides: what rows become, what is counted, what the loss is. Everything else is the same for all tasks.

    rows --collate--> Batch --counts--> what each sum is divided by (over the global batch, before any backward pass)
                        |
    hidden (B, T, D) --loss(hidden, batch, head)--> named sums       loss of a step = sum over names of weight x sum / count

B rows, T positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from hybridtrain.data.rows import Block
    from hybridtrain.tasks.head import Head
    from hybridtrain.types import Batch, Sums


class Task(Protocol):
    """The seam. Names, and their order, are those of `weights` in everything that is by name."""

    weights: Mapping[str, float]
    """Name of a sum -> the weight with which its mean is differentiated."""

    def collate(self, block: Block, *, valid: int) -> Batch:
        """Rows of S + 1 tokens to one batch of S positions on the CPU; rows from `valid` on fill it up and must not count."""

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """By how much each sum grows per batch if every loss is 1: its denominator, 0-d int64, without waiting for the device."""

    def loss(self, hidden_BTD: Tensor, batch: Batch, head: Head) -> dict[str, Tensor]:
        """Sums of losses, each fp32 of shape (1,), the same on all tp ranks. `hidden_BTD` comes from the final norm and may be a DTensor."""

    def loss_of_logits(self, logits_BTV: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The same sums by their definition, 0-d: what the plain process and `evaluate` compute."""

    def evaluate(self, sums: Sums) -> dict[str, float]:
        """Metrics of an evaluation, by the names that metrics.jsonl has."""
