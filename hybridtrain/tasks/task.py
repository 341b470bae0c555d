"""The interface of a task: it turns rows into a batch, counts labels and computes the loss. All other code is the same for all tasks.

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
    """What a task implements. Everything returned by name has the names of `weights`."""

    weights: Mapping[str, float]
    """Name of a sum -> the weight of its mean in the loss of a step."""

    def collate(self, block: Block, *, valid: int) -> Batch:
        """Rows of S + 1 tokens -> a batch of S positions, on the CPU. Rows from index `valid` on only fill up the batch and must have no labels."""

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """What each sum is divided by, usually the number of labels: 0-d int64, computed without waiting for the device."""

    def loss(self, hidden_BTD: Tensor, batch: Batch, head: Head) -> dict[str, Tensor]:
        """Sums of losses, each fp32 of shape (1,), the same on all tp ranks. `hidden_BTD` comes from the final norm and may be a DTensor."""

    def loss_of_logits(self, logits_BTV: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The same sums from the logits of the plain Hugging Face model, 0-d; used by parity and `hybridtrain evaluate`."""

    def evaluate(self, sums: Sums) -> dict[str, float]:
        """Metrics of an evaluation, `eval_loss` among them, as they are written to metrics.jsonl."""
