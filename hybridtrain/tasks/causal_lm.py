"""Next-token prediction: pre-training, and fine-tuning on conversations, in which only some
tokens have a label.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hybridtrain.tasks.head import Head
from hybridtrain.tasks.linear_cross_entropy import Terms, linear_cross_entropy
from hybridtrain.types import IGNORE_INDEX, Batch, Sums

if TYPE_CHECKING:
    from hybridtrain.data.rows import Block


class CausalLM:
    """See task.Task. One sum: the losses of all tokens with a label."""

    weights: Mapping[str, float] = {"loss": 1.0}
    terms = Terms(smoothing=0.0, z_loss=0.0)
    """Added to cross-entropy in training (task.label_smoothing, task.z_loss), not in evaluation."""

    def collate(self, block: Block, *, valid: int) -> Batch:
        """Inputs, and labels shifted by one.

        At the first token of a document, positions restart, and there is no label.
        """
        labels, index = block.tokens[:, 1:].copy(), np.arange(block.tokens.shape[1] - 1)
        labels[valid:] = IGNORE_INDEX
        if block.loss_mask is not None:
            labels[~block.loss_mask[:, 1:]] = IGNORE_INDEX
        positions = np.tile(index, (len(labels), 1))
        if block.doc_start is not None:
            labels[block.doc_start[:, 1:]] = IGNORE_INDEX
            positions -= np.maximum.accumulate(np.where(block.doc_start[:, :-1], index, 0), axis=1)
        ids, targets, places = (
            torch.from_numpy(np.ascontiguousarray(each)) for each in (block.tokens[:, :-1], labels, positions)
        )
        return Batch(ids, targets, places, packed=block.doc_start is not None)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The number of tokens with a label."""
        return {"loss": (batch.labels_BT != IGNORE_INDEX).sum()}

    def loss(self, hidden_BTD: Tensor, batch: Batch, head: Head) -> dict[str, Tensor]:
        """The sum of the losses of all tokens with a label."""
        return {"loss": self.cross_entropy(hidden_BTD, batch.labels_BT, head, name="loss")}

    def loss_of_logits(self, logits_BTV: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The sum of the losses of all tokens with a label."""
        return {"loss": self.cross_entropy_of_logits(logits_BTV, batch.labels_BT)}

    def evaluate(self, sums: Sums) -> dict[str, float]:
        """The mean loss per token."""
        return {"eval_loss": sums.values["loss"] / sums.counts["loss"]}

    def cross_entropy(self, hidden_BTD: Tensor, labels_BT: Tensor, head: Head, *, name: str) -> Tensor:
        """Cross-entropy of the head's logits, computed in chunks, summed over labels that are
        not IGNORE_INDEX: fp32, (1,).

        `name`: the sum's name in `weights`.
        """
        return self.counted_cross_entropy(hidden_BTD, labels_BT, head, name=name, right=None)

    def counted_cross_entropy(
        self, hidden_BTD: Tensor, labels_BT: Tensor, head: Head, *, name: str, right: Tensor | None
    ) -> Tensor:
        """The same, and adds to `right`, fp32, (1,), the number of labels whose logit is the largest."""
        terms = self.terms if head.training else CausalLM.terms
        return linear_cross_entropy(
            hidden_BTD,
            labels_BT,
            weight_VD=head.local("weight"),
            bias_V=head.local("bias"),
            transform=head.transform,
            terms=terms,
            chunk=head.loss_chunk,
            gradients=head.gradients_of(name),
            ranks=head.ranks,
            entries=head.entries,
            right=right,
        )

    def cross_entropy_of_logits(self, logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
        """The same sum from logits, fp32, 0-d, with label smoothing and z-loss."""
        labels_N = labels_BT.flatten().to(logits_BTV.device)
        logits_NV, terms = logits_BTV.flatten(0, 1).float(), self.terms
        loss = F.cross_entropy(
            logits_NV, labels_N, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=terms.smoothing
        )
        return (
            loss + terms.z_loss * logits_NV[labels_N != IGNORE_INDEX].logsumexp(-1).square().sum()
            if terms.z_loss
            else loss
        )
