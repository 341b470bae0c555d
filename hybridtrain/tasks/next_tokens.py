"""The most likely next token of texts, for samples of a model under training.

    rows     t0 t1 ... tn  .  .      a text each, filled up to one length
    labels    -  -      p  -  -      p: the number of the text, at its last token
                        |
    hidden(tn) --head--> the token with the largest logit, which is the sum `p`

B rows, T positions, D hidden, P texts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridtrain.tasks.causal_lm import CausalLM
from hybridtrain.tasks.head import Head
from hybridtrain.types import Batch


class NextTokens(CausalLM):
    """See task.Task. Its sums are ids of tokens: fp32 holds those below 2^24 exactly."""

    def __init__(self, texts: int):
        self.weights = {str(number): 0.0 for number in range(texts)}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """1 for each text in the batch."""
        return {name: (batch.labels_BT == int(name)).sum() for name in self.weights}

    def loss(self, hidden_BTD: Tensor, batch: Batch, head: Head) -> dict[str, Tensor]:
        """The next token of each text in the batch, 0 for others."""
        numbers_B, places_B = batch.labels_BT.max(1)
        rows_B = torch.arange(len(places_B), device=places_B.device)
        ids_B = head.logits(hidden_BTD[rows_B, places_B].unsqueeze(1)).argmax(-1).squeeze(1)
        numbers_P1 = torch.arange(len(self.weights), device=places_B.device).unsqueeze(1)
        ids_P = torch.where(numbers_B == numbers_P1, ids_B, 0).sum(1).float()
        return {name: ids_P[int(name)].view(1) for name in self.weights}
