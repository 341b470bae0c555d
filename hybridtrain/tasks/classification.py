"""Sequence classification: one label per document, from the hidden state of its last
token, as in transformers.

    tokens   t0 t1 ... tn  c      the class number is stored as the next token; only it is a target
                        |
    hidden(tn) --head (C, D)--> logits (C) --cross-entropy--> loss, and whether the largest logit is the class

So rows, packing, padding and masks work as for every corpus with a loss mask, and documents in one row do not
attend to each other. C classes; B rows, T positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hybridtrain.errors import refusal
from hybridtrain.tasks.causal_lm import CausalLM
from hybridtrain.types import IGNORE_INDEX, Batch, Sums

if TYPE_CHECKING:
    from hybridtrain.data.rows import Block
    from hybridtrain.tasks.head import Head


class Classification(CausalLM):
    """See task.Task. `labels`: number of classes.

    The sum `correct`, of right predictions, has weight 0: it is only measured.
    """

    weights: Mapping[str, float] = {"loss": 1.0, "correct": 0.0}

    def __init__(self, *, labels: int):
        self.labels = labels

    def collate(self, block: Block, *, valid: int) -> Batch:
        """As CausalLM.collate.

        Raises UserError for rows without labels, and labels that are no class number.
        """
        if block.loss_mask is None:
            problem, allowed = (
                "its rows have no labels",
                "a corpus of data.format=labelled, or rows with one label each",
            )
            raise refusal(
                "task.kind",
                "classification",
                problem,
                allowed=allowed,
                instead="hybridtrain prepare data.format=labelled, or task.kind=causal_lm",
            )
        batch = super().collate(block, valid=valid)
        labels = batch.labels_BT.numpy()
        classes = labels[labels != IGNORE_INDEX]
        if classes.size and not 0 <= classes.min() <= classes.max() < self.labels:
            wrong = int(classes.max() if classes.max() >= self.labels else classes.min())
            problem = f"a row has label {wrong}, the model has {self.labels} classes"
            raise refusal(
                "model.labels",
                self.labels,
                problem,
                allowed=f"labels of 0 to {self.labels - 1}",
                instead="model.labels=[...] with all classes",
            )
        return batch

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The number of documents with a label, for both sums."""
        return dict.fromkeys(self.weights, super().counts(batch)["loss"])

    def loss(self, hidden_BTD: Tensor, batch: Batch, head: Head) -> dict[str, Tensor]:
        """The losses, and the number of right predictions from all logits, which are few."""
        sums = super().loss(hidden_BTD, batch, head)
        with torch.no_grad():
            return {**sums, "correct": _correct(head.logits(hidden_BTD), batch).view(1)}

    def loss_of_logits(self, logits_BTV: Tensor, batch: Batch) -> dict[str, Tensor]:
        """`logits_BTV`: the head's output at every position, (B, T, C)."""
        return {**super().loss_of_logits(logits_BTV, batch), "correct": _correct(logits_BTV.detach(), batch)}

    def evaluate(self, sums: Sums) -> dict[str, float]:
        """The mean loss per document, and the accuracy."""
        return {**super().evaluate(sums), "eval_accuracy": sums.values["correct"] / sums.counts["correct"]}


def _correct(logits_BTC: Tensor, batch: Batch) -> Tensor:
    """Number of labels whose logit is the largest, fp32, 0-d."""
    labels_BT = batch.labels_BT.to(logits_BTC.device)
    return (logits_BTC.argmax(-1) == labels_BT).sum().float()  # never equal to IGNORE_INDEX
