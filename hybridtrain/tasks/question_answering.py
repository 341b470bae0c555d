"""Extractive question answering: the first and the last token of the answer in a context. As in transformers'
...ForQuestionAnswering of encoders.

    row      [CLS] question [SEP] context [SEP] | [PAD] ...     the padding is a document of its own
    hidden   (B, T, D) --head (2, D)--> logits (B, T, 2) of the first and the last token

The loss is the mean of two cross-entropies over the positions of a row, without its padding.

B rows, T positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hybridtrain.errors import refusal
from hybridtrain.tasks.causal_lm import CausalLM
from hybridtrain.tasks.classification import padded
from hybridtrain.tasks.token_classification import text_of
from hybridtrain.types import (
    ANSWER_FIRST,
    ANSWER_LAST,
    IGNORE_INDEX,
    SECOND_SEGMENT,
    AnswerBatch,
    Batch,
    Sums,
)

if TYPE_CHECKING:
    from hybridtrain.data.rows import Block
    from hybridtrain.tasks.head import Head


class QuestionAnswering(CausalLM):
    """See task.Task. `tokens`: the id of the special token pad, if it is known.

    The sum `exact`, of rows of which both tokens are found, has weight 0: it is only measured.
    """

    weights: Mapping[str, float] = {"loss": 1.0, "exact": 0.0}
    encoder = True

    def __init__(self, *, tokens: Mapping[str, int]):
        self.pad = tokens.get("pad", 0)

    def collate(self, block: Block, *, valid: int) -> Batch:
        """A question and its context for each row.

        Raises UserError for other rows.
        """
        marks, rows = block.marks, np.arange(len(block.tokens)) < valid
        ends = [np.zeros((0, 0), dtype=bool)] * 2
        if marks is not None:
            ends = [(marks[:, 1:] & part) != 0 for part in (ANSWER_FIRST, ANSWER_LAST)]
        if marks is None or not all((each.sum(1) == 1)[rows].all() for each in ends):
            raise refusal(
                "task.kind",
                "question_answering",
                "its rows are no questions with an answer in a context",
                allowed="a corpus of data.format=answers",
                instead="hybridtrain prepare data.format=answers, or another task",
            )
        ids, places = padded(block.tokens[:, :-1], text_of(block), pad=self.pad)
        labels = np.full(ids.shape, IGNORE_INDEX)
        labels[:, :2] = np.where(
            rows[:, None], np.stack([each.argmax(1) for each in ends], axis=1), IGNORE_INDEX
        )
        segments = torch.from_numpy((marks[:, 1:] & SECOND_SEGMENT).astype(np.int64))
        return AnswerBatch(ids, torch.from_numpy(labels), places, packed=True, segment_ids_BT=segments)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The number of rows with an answer, for both sums."""
        return dict.fromkeys(self.weights, (batch.labels_BT[:, 0] != IGNORE_INDEX).sum())

    def loss(self, hidden_BTD: Tensor, batch: Batch, head: Head) -> dict[str, Tensor]:
        """The losses, and the number of rows of which both tokens are found."""
        sums = self.loss_of_logits(head.logits(hidden_BTD), batch)
        return {name: value.view(1) for name, value in sums.items()}

    def loss_of_logits(self, logits_BTV: Tensor, batch: Batch) -> dict[str, Tensor]:
        """`logits_BTV`: of the first and the last token, (B, T, 2)."""
        text_BT = ((batch.position_ids_BT == 0).cumsum(1) == 1).to(logits_BTV.device)
        scores_B2T = logits_BTV.float().masked_fill(~text_BT[..., None], float("-inf")).transpose(1, 2)
        labels_B2 = batch.labels_BT[:, :2].to(logits_BTV.device)
        loss = cross_entropy(
            scores_B2T.flatten(0, 1), labels_B2.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        exact = (scores_B2T.detach().argmax(-1) == labels_B2).all(1).sum()
        return {"loss": loss / 2, "exact": exact.float()}

    def evaluate(self, sums: Sums) -> dict[str, float]:
        """The mean loss per row, and the share of rows of which both tokens are found."""
        return {**super().evaluate(sums), "eval_exact_match": sums.values["exact"] / sums.counts["exact"]}
