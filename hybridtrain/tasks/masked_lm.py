"""Masked language modelling, the pre-training of encoders (BERT, arXiv 1810.04805; RoBERTa, 1907.11692).

    tokens   [CLS] t0  t1  t2  t3  ...     of all but the special ones a share of task.mask_rate is drawn:
    inputs   [CLS] t0 [MASK] t2  r  ...    80 % become the mask token, 10 % a random token r, 10 % stay
    labels     -   -   t1   -   t3  ...    only the drawn ones have a label

What is drawn follows from the row's key and the position alone (runtime/hashing.py), so every layout masks
the same tokens, and a run that resumes needs no state.

B rows, T positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hybridtrain.errors import refusal
from hybridtrain.runtime import hashing
from hybridtrain.tasks.causal_lm import CausalLM
from hybridtrain.types import IGNORE_INDEX, Batch, Sums

if TYPE_CHECKING:
    from hybridtrain.config.schema import TaskConfig
    from hybridtrain.data.rows import Block
    from hybridtrain.tasks.head import Head

_DRAWN, _KIND, _TOKEN = range(3)
"""Purposes of random numbers (hashing.bits)."""


class MaskedLM(CausalLM):
    """See task.Task. `settings`: task.tokens and task.mask_rate; `vocab`: random tokens are below it.

    The sum `accuracy`, of right predictions, has weight 0: it is only measured.
    """

    weights: Mapping[str, float] = {"loss": 1.0, "accuracy": 0.0}
    encoder = True

    def __init__(self, settings: TaskConfig, *, vocab: int):
        self.rate, self.vocab = settings.mask_rate, vocab
        self.mask, self.first = settings.tokens["mask"], settings.tokens.get("cls")
        self.special = np.array(sorted(set(settings.tokens.values())))

    def collate(self, block: Block, *, valid: int) -> Batch:
        """The first S tokens of each row, of text after the token that begins one, some of them masked."""
        if block.keys is None:
            problem, instead = "its rows have no keys to draw masks from", "rows of a Loader"
            raise refusal("task.kind", "masked_lm", problem, allowed="blocks with keys", instead=instead)
        tokens, start = block.tokens[:, :-1].copy(), block.doc_start
        allowed = np.ones(tokens.shape, dtype=bool) if block.loss_mask is None else block.loss_mask[:, :-1]
        if self.first is not None and block.loss_mask is None:
            tokens[:, 1:], tokens[:, 0] = tokens[:, :-1].copy(), self.first
            start = None if start is None else np.insert(start, 0, values=False, axis=1)
        allowed = allowed & (np.arange(len(tokens)) < valid)[:, None]
        continues = block.continues
        if continues is not None and self.first is not None and block.loss_mask is None:
            continues = np.insert(continues, 0, values=False, axis=1)
        inputs, labels = self._masked(tokens, block.keys, allowed=allowed, continues=continues)
        index = np.arange(tokens.shape[1])
        positions = np.tile(index, (len(tokens), 1))
        if start is not None:
            starts = start[:, : len(index)] & (index > 0)
            positions -= np.maximum.accumulate(np.where(starts, index, 0), axis=1)
        ids, targets, places = (torch.from_numpy(each) for each in (inputs, labels, positions))
        return Batch(ids, targets, places, packed=start is not None)

    def _masked(
        self, tokens: np.ndarray, keys: np.ndarray, *, allowed: np.ndarray, continues: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, labels) from tokens (B, T). Special tokens are not masked, nor those not `allowed`.

        `continues`: where a token continues a word, of which all tokens are drawn or none.
        """
        places, keys = np.arange(tokens.shape[1]), keys[:, None]
        words = places
        if continues is not None:
            begins = ~continues[:, : len(places)] | (places == 0)
            words = np.maximum.accumulate(np.where(begins, places, 0), axis=1)
        drawn = hashing.uniform(keys, words, purpose=_DRAWN) < self.rate
        drawn &= allowed & ~np.isin(tokens, self.special)
        kind = hashing.uniform(keys, places, purpose=_KIND)
        others = (hashing.uniform(keys, places, purpose=_TOKEN) * self.vocab).astype(np.int64)
        replaced = np.where(kind < 0.8, self.mask, np.where(kind < 0.9, others, tokens))
        return np.where(drawn, replaced, tokens), np.where(drawn, tokens, IGNORE_INDEX)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The number of tokens with a label, for both sums."""
        return dict.fromkeys(self.weights, super().counts(batch)["loss"])

    def loss(self, hidden_BTD: Tensor, batch: Batch, head: Head) -> dict[str, Tensor]:
        """The losses of all tokens with a label, and the number of right predictions."""
        right = hidden_BTD.new_zeros(1, dtype=torch.float32)
        loss = self.counted_cross_entropy(hidden_BTD, batch.labels_BT, head, name="loss", right=right)
        return {"loss": loss, "accuracy": right}

    def loss_of_logits(self, logits_BTV: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The same two sums."""
        labels = batch.labels_BT.to(logits_BTV.device)
        right = (logits_BTV.detach().argmax(-1) == labels).sum().float()  # never equal to IGNORE_INDEX
        return {**super().loss_of_logits(logits_BTV, batch), "accuracy": right}

    def evaluate(self, sums: Sums) -> dict[str, float]:
        """The mean loss per masked token, and the share that is predicted right."""
        return {**super().evaluate(sums), "eval_accuracy": sums.values["accuracy"] / sums.counts["accuracy"]}
