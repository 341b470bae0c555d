"""The interface of a task: collates rows into a batch, counts targets and computes the loss.

Nothing else depends on the task.

    rows --collate--> Batch --counts--> divisor of each sum (over the global batch, before any backward pass)
                        |
    hidden (B, T, D) --loss(hidden, batch, head)--> named sums       loss of a step = sum over names of weight
                                                                     x sum / count

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
    """What a task implements. Results by name have the names of `weights`.

    A task that masks what it predicts, for encoders, also has `encoder = True`.
    """

    weights: Mapping[str, float]
    """Name of a sum -> the weight of its mean in the loss of a step."""

    def collate(self, block: Block, *, valid: int) -> Batch:
        """A batch of S positions from rows of S + 1 tokens, on the CPU.

        Rows from index `valid` on are padding, without labels.
        """

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The divisor of each sum, usually the number of labels: 0-d int64, computed without
        waiting for the device.
        """

    def loss(self, hidden_BTD: Tensor, batch: Batch, head: Head) -> dict[str, Tensor]:
        """Sums of losses, fp32, (1,), the same on all tp ranks.

        `hidden_BTD`: output of the final norm.
        """

    def loss_of_logits(self, logits_BTV: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The same sums, 0-d, from the logits of the Hugging Face model; for
        parity and `hybridtrain evaluate`.
        """

    def evaluate(self, sums: Sums) -> dict[str, float]:
        """The metrics of an evaluation for metrics.jsonl, with `eval_loss` among them."""
