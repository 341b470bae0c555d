"""Sequence classification: one label per document, as in transformers: by a decoder from the hidden state of
its last token, by an encoder from what it makes of the whole text.

    tokens   t0 t1 ... tn  c      the class number is stored as the next token; only it is a target
                        |
    hidden(tn) --head (C, D)--> logits (C) --cross-entropy--> loss, and whether the largest logit is the class

So rows, packing, padding and masks work as for every corpus with a loss mask, and documents in one row do not
attend to each other.

An encoder's rows are one text each, and its head takes one hidden state for each row:

    tokens   [CLS] t0 ... tn [SEP] c      text     [CLS] t0 ... tn [SEP] | [PAD] ...   a document of its own
                                          hidden   pooled (B, D) --head--> logits (B, C)

C classes; B rows, T positions, D hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hybridtrain.errors import UserError, refusal
from hybridtrain.tasks.causal_lm import CausalLM
from hybridtrain.types import IGNORE_INDEX, Batch, Sums, TextBatch

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
            raise _without_labels()
        batch = super().collate(block, valid=valid)
        self.check_labels(batch.labels_BT.numpy())
        return batch

    def check_labels(self, labels: np.ndarray) -> None:
        """Raise UserError for labels that are no class number."""
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


class TextClassification(Classification):
    """Of an encoder. `tokens`: ids of the special tokens cls and pad, as far as they are known."""

    encoder = True

    def __init__(self, *, labels: int, tokens: Mapping[str, int]):
        super().__init__(labels=labels)
        self.first, self.pad = tokens.get("cls"), tokens.get("pad", 0)

    def collate(self, block: Block, *, valid: int) -> Batch:
        """A text for each row, without its label.

        Raises UserError for rows without labels, labels that are no class number, and texts that do not begin
        with the token that their class is read from.
        """
        if block.loss_mask is None:
            raise _without_labels()
        carries = block.loss_mask & (np.arange(len(block.loss_mask)) < valid)[:, None]
        place = np.where(carries.any(1), carries.argmax(1), carries.shape[1] - 1)
        text = np.arange(carries.shape[1] - 1) < place[:, None]
        classes = np.take_along_axis(block.tokens, place[:, None], axis=1)
        labels = np.full(text.shape, IGNORE_INDEX)
        labels[:, :1] = np.where(carries.any(1, keepdims=True), classes, IGNORE_INDEX)
        self.check_labels(labels)
        self._check_first(block.tokens[carries.any(1), 0])
        ids, places = padded(block.tokens[:, :-1], text, pad=self.pad)
        return TextBatch(ids, torch.from_numpy(labels), places, packed=True)

    def _check_first(self, tokens: np.ndarray) -> None:
        """Raise UserError unless these, with which texts begin, are what their class is read from."""
        if self.first is None or (tokens == self.first).all():
            return
        other = int(tokens[tokens != self.first][0])
        problem = f"a text begins with token {other}: an encoder reads its class from the token cls"
        allowed, instead = f"texts that begin with {self.first}", "data of the model's own tokenizer"
        raise refusal("task.tokens", f"{{cls: {self.first}}}", problem, allowed=allowed, instead=instead)

    def loss(self, hidden_BTD: Tensor, batch: Batch, head: Head) -> dict[str, Tensor]:
        """`hidden_BTD`: one hidden state for each row, (B, D)."""
        return super().loss(hidden_BTD.unsqueeze(1), _of_rows(batch), head)

    def loss_of_logits(self, logits_BTV: Tensor, batch: Batch) -> dict[str, Tensor]:
        """`logits_BTV`: of each row, (B, C)."""
        return super().loss_of_logits(logits_BTV.unsqueeze(1), _of_rows(batch))


def padded(tokens: np.ndarray, text: np.ndarray, *, pad: int) -> tuple[Tensor, Tensor]:
    """(ids, positions) of rows with a `text`, bool (B, T), at their beginning, and padding, which is a
    document of its own.
    """
    places = np.arange(text.shape[1]) - np.where(text, 0, text.sum(1, keepdims=True))
    return torch.from_numpy(np.where(text, tokens, pad)), torch.from_numpy(places)


def _of_rows(batch: Batch) -> Batch:
    return dataclasses.replace(batch, labels_BT=batch.labels_BT[:, :1])


def _without_labels() -> UserError:
    return refusal(
        "task.kind",
        "classification",
        "its rows have no labels",
        allowed="a corpus of data.format=labelled, or rows with one label each",
        instead="hybridtrain prepare data.format=labelled, or task.kind=causal_lm",
    )


def _correct(logits_BTC: Tensor, batch: Batch) -> Tensor:
    """Number of labels whose logit is the largest, fp32, 0-d."""
    labels_BT = batch.labels_BT.to(logits_BTC.device)
    return (logits_BTC.argmax(-1) == labels_BT).sum().float()  # never equal to IGNORE_INDEX
