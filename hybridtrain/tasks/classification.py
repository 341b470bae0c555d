"""One label for each document, from the hidden state of its last token: transformers' ...ForSequenceClassification.

    tokens   t0 t1 ... tn  c      the class number takes the place of the next token; only it has a loss
                        |
    hidden(tn) --head (C, D)--> logits (C) --cross-entropy--> loss, and whether the largest is the class

So rows, packing, padding and masks work as in any corpus where only some tokens have a loss, and documents in one row do not
attend to each other. C classes; B rows, T positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hybridtrain.errors import refusal
from hybridtrain.tasks.causal_lm import CausalLM
from hybridtrain.types import IGNORE_INDEX, Batch, Sums

if TYPE_CHECKING:
    from hybridtrain.data.rows import Block
    from hybridtrain.tasks.head import Head


class Classification(CausalLM):
    """See task.Task. `labels`: number of classes. `correct` counts right predictions; its weight is 0, so it is not trained on."""

    weights: Mapping[str, float] = {"loss": 1.0, "correct": 0.0}

    def __init__(self, *, labels: int):
        self.labels = labels

    def collate(self, block: Block, *, valid: int) -> Batch:
        """As CausalLM.collate. Refuses labels that are not a class number, and rows without labels (raises UserError)."""
        if block.loss_mask is None:
            problem, allowed = "its rows have no labels", "a corpus of data.format=labelled, or rows with one label each"
            raise refusal("task.kind", "classification", problem, allowed=allowed, instead="hybridtrain prepare data.format=labelled, or task.kind=causal_lm")
        batch = super().collate(block, valid=valid)
        labels = batch.labels_BT.numpy()
        met = labels[labels != IGNORE_INDEX]
        if met.size and not 0 <= met.min() <= met.max() < self.labels:
            odd = int(met.max() if met.max() >= self.labels else met.min())
            problem = f"a row has label {odd}, the model has {self.labels} classes"
            raise refusal("model.labels", self.labels, problem, allowed=f"labels of 0 to {self.labels - 1}", instead="model.labels=[...] with all classes")
        return batch

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Documents with a label, of both sums."""
        return dict.fromkeys(self.weights, super().counts(batch)["loss"])

    def loss(self, hidden_BTD: Tensor, batch: Batch, head: Head) -> dict[str, Tensor]:
        """The head is as small as the classes are few: all of it is at hand for the largest logit."""
        found = super().loss(hidden_BTD, batch, head)
        with torch.no_grad():
            hidden, weight = (_whole(tensor.detach()) for tensor in (hidden_BTD, head.weight))
            return {**found, "correct": _correct(hidden @ weight.t(), batch).view(1)}

    def loss_of_logits(self, logits_BTV: Tensor, batch: Batch) -> dict[str, Tensor]:
        """`logits_BTV`: the head's output at every position, (B, T, C)."""
        return {**super().loss_of_logits(logits_BTV, batch), "correct": _correct(logits_BTV.detach(), batch)}

    def evaluate(self, sums: Sums) -> dict[str, float]:
        """The mean loss per document, and the share whose class is found."""
        return {**super().evaluate(sums), "eval_accuracy": sums.values["correct"] / sums.counts["correct"]}


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _correct(logits_BTC: Tensor, batch: Batch) -> Tensor:
    """How many labels are the largest logit, fp32, 0-d."""
    labels_BT = batch.labels_BT.to(logits_BTC.device)
    return (logits_BTC.argmax(-1) == labels_BT).sum().float()  # IGNORE_INDEX is no place of a logit
