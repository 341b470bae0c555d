"""Token classification: a label for each word of a text (its kind of name, its part of speech), predicted at
its first token; other tokens have none. As in transformers' ...ForTokenClassification.

    tokens   t0 t1 t2 ... tn  -     marks   -  m0 m1 ... mn     class of t0 + 1, or 0 (data/prepare/words.py)
             |  |  |      |
    hidden (B, T, D) --head (C, D)--> logits (B, T, C) --cross-entropy--> loss, and right predictions

A decoder's rows are several texts, which do not attend to each other; an encoder's are one text and padding,
as in classification.py.

C classes; B rows, T positions, D hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from hybridtrain.errors import refusal
from hybridtrain.tasks.causal_lm import CausalLM
from hybridtrain.tasks.classification import Classification, padded
from hybridtrain.types import IGNORE_INDEX, Batch, TokenBatch

if TYPE_CHECKING:
    from hybridtrain.data.rows import Block


class TokenClassification(Classification):
    """See task.Task. `labels`: number of classes."""

    def collate(self, block: Block, *, valid: int) -> Batch:
        """Inputs, and the classes of their tokens.

        Raises UserError for rows without labels of words, and labels that are no class number.
        """
        marks, carries = block.marks, block.loss_mask
        if marks is None or carries is None or (carries & (marks == 0)).any():
            raise refusal(
                "task.kind",
                "token_classification",
                "its rows have no labels of words",
                allowed="a corpus of data.format=labelled_words",
                instead="hybridtrain prepare data.format=labelled_words, or another task",
            )
        batch = CausalLM.collate(self, block, valid=valid)
        classes = torch.from_numpy(marks[:, 1:].astype(np.int64) - 1)
        labels = classes.masked_fill(batch.labels_BT == IGNORE_INDEX, IGNORE_INDEX)
        self.check_labels(labels.numpy())
        return dataclasses.replace(batch, labels_BT=labels)


class TextTokenClassification(TokenClassification):
    """Of an encoder. `tokens`: the id of the special token pad, if it is known."""

    encoder = True

    def __init__(self, *, labels: int, tokens: Mapping[str, int]):
        super().__init__(labels=labels)
        self.pad = tokens.get("pad", 0)

    def collate(self, block: Block, *, valid: int) -> Batch:
        """A text for each row, and the classes of its tokens. Raises UserError as above."""
        batch = super().collate(block, valid=valid)
        ids, places = padded(batch.input_ids_BT.numpy(), text_of(block), pad=self.pad)
        return TokenBatch(ids, batch.labels_BT, places, packed=True)


def text_of(block: Block) -> np.ndarray:
    """bool (B, T): the tokens of the one text in each row, without the token after it, and the padding."""
    length = block.tokens.shape[1] - 1
    if block.doc_start is None:
        return np.ones((len(block.tokens), length), dtype=bool)
    padding = block.doc_start[:, 1:]
    assert (padding.sum(1) <= 1).all()  # a row of its own for each text
    ends = np.where(padding.any(1), padding.argmax(1), length)
    return np.arange(length) < ends[:, None]
