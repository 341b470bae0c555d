"""Masked language modelling together with next sentence prediction, the pre-training of BERT.

    tokens     [CLS] first part [SEP] second part [SEP] [PAD] ...
    segments     0       0        0        1        1     0          the padding is a document of its own

The head for pairs tells from the first position whether the second part follows the first. The loss is the
mean over masked tokens plus the mean over rows.

B rows, T positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hybridtrain.errors import refusal
from hybridtrain.tasks.masked_lm import MaskedLM
from hybridtrain.types import IGNORE_INDEX, Batch, PairBatch, Sums

if TYPE_CHECKING:
    from hybridtrain.config.schema import TaskConfig
    from hybridtrain.data.rows import Block
    from hybridtrain.tasks.head import Head


class NextSentence(MaskedLM):
    """See task.Task. The sums with `accuracy` in their names, of right predictions, are only measured."""

    weights: Mapping[str, float] = {"loss": 1.0, "accuracy": 0.0, "next_loss": 1.0, "next_accuracy": 0.0}

    def __init__(self, settings: TaskConfig, *, vocab: int):
        super().__init__(settings, vocab=vocab)
        self.cls, self.sep, self.pad = (settings.tokens[name] for name in ("cls", "sep", "pad"))

    def collate(self, block: Block, *, valid: int) -> Batch:
        """Pairs with special tokens and padding, some of their tokens masked."""
        if block.segments is None or block.unrelated is None or block.keys is None:
            problem, allowed = "its rows are no pairs", "a corpus prepared with data.sentences=true"
            instead = "task.next_sentence=false"
            raise refusal("task.next_sentence", True, problem, allowed=allowed, instead=instead)
        place = np.arange(block.tokens.shape[1] - 1)
        a, b = ((block.segments == part).sum(1, keepdims=True) for part in (0, 1))
        first, second = (place >= 1) & (place <= a), (place >= a + 2) & (place <= a + b + 1)
        source = np.where(first, place - 1, np.where(second, place - 2, 0))
        text = np.take_along_axis(block.tokens, source, axis=1)
        ends = (place == a + 1) | (place == a + b + 2)
        special = np.where(place == 0, self.cls, np.where(ends, self.sep, self.pad))
        tokens = np.where(first | second, text, special)
        rows = np.arange(len(tokens)) < valid
        continues = block.continues
        if continues is not None:
            continues = np.take_along_axis(continues, source, axis=1) & (first | second)
            continues &= (place != 1) & (place != a + 2)  # the first token of a part begins a word
        inputs, labels = self._masked(
            tokens, block.keys, allowed=(first | second) & rows[:, None], continues=continues
        )
        positions = place - np.where(place >= a + b + 3, a + b + 3, 0)
        segments = ((place >= a + 2) & (place <= a + b + 2)).astype(np.int64)
        unrelated = np.where(rows, block.unrelated, IGNORE_INDEX)
        ids, targets, places, parts, pairs = (
            torch.from_numpy(each) for each in (inputs, labels, positions, segments, unrelated)
        )
        return PairBatch(ids, targets, places, packed=True, segment_ids_BT=parts, unrelated_B=pairs)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The number of masked tokens for two sums, and that of rows for two."""
        assert isinstance(batch, PairBatch)
        tokens, rows = ((labels != IGNORE_INDEX).sum() for labels in (batch.labels_BT, batch.unrelated_B))
        return {"loss": tokens, "accuracy": tokens, "next_loss": rows, "next_accuracy": rows}

    def loss(self, hidden_BTD: Tensor, batch: Batch, head: Head) -> dict[str, Tensor]:
        """Losses and numbers of right predictions, of masked tokens and of pairs."""
        assert isinstance(batch, PairBatch)
        assert head.pairs_B2 is not None
        return {**super().loss(hidden_BTD, batch, head), **_of_pairs(head.pairs_B2, batch)}

    def loss_of_pairs(self, logits_BTV: Tensor, pairs_B2: Tensor, batch: PairBatch) -> dict[str, Tensor]:
        """The same sums, from the logits of both heads."""
        of_pairs = {name: value.squeeze() for name, value in _of_pairs(pairs_B2, batch).items()}
        return {**self.loss_of_logits(logits_BTV, batch), **of_pairs}

    def evaluate(self, sums: Sums) -> dict[str, float]:
        """The sum of both mean losses, each of them, and the shares that are predicted right."""
        of_tokens = super().evaluate(sums)
        following = sums.values["next_loss"] / sums.counts["next_loss"]
        return {
            **of_tokens,
            "eval_loss": of_tokens["eval_loss"] + following,
            "eval_masked_loss": of_tokens["eval_loss"],
            "eval_next_loss": following,
            "eval_next_accuracy": sums.values["next_accuracy"] / sums.counts["next_accuracy"],
        }


def _of_pairs(pairs_B2: Tensor, batch: PairBatch) -> dict[str, Tensor]:
    """The sums over pairs, fp32 or wider, (1,)."""
    labels = batch.unrelated_B.to(pairs_B2.device)
    loss = cross_entropy(pairs_B2.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum")
    right = (pairs_B2.detach().argmax(-1) == labels).sum().float()
    return {"next_loss": loss.view(1), "next_accuracy": right.view(1)}
