"""Batches with classes as labels, and their loss by the logits of transformers' own model: for proofs on
reduced copies (analyse.py).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from hybridtrain.models import classifier, heads
from hybridtrain.types import IGNORE_INDEX, AnswerBatch, Batch, TextBatch, TokenBatch


def with_classes(config: Any, batch: Batch) -> Batch:
    """A batch with classes as labels; an encoder's rows have padding, but the first."""
    ids, count = batch.input_ids_BT, config.num_labels
    labels = (ids % count).where(batch.labels_BT != IGNORE_INDEX, IGNORE_INDEX)
    if not heads.is_encoder(config):
        return dataclasses.replace(batch, labels_BT=labels)
    place, lengths = torch.arange(ids.shape[1]), ids.shape[1] - 5 * torch.arange(len(ids)).unsqueeze(1)
    text = place < lengths
    padding = getattr(config, "pad_token_id", None) or 0
    if classifier.kind_of(config.architectures) == classifier.ANSWERS:
        answers = torch.full_like(ids, IGNORE_INDEX)
        answers[:, 0], answers[:, 1] = 4, 5
        values = (
            ids.where(text, padding),
            answers,
            torch.where(text, place, place - lengths),
            True,
            batch.keys_B,
        )
        return AnswerBatch(*values, segment_ids_BT=(text & (place > 3)).long())
    of_tokens = classifier.kind_of(config.architectures) == classifier.TOKENS
    return (TokenBatch if of_tokens else TextBatch)(
        ids.where(text, padding),
        labels.where(text if of_tokens else place == 0, IGNORE_INDEX),
        torch.where(text, place, place - lengths),
        packed=True,
        keys_B=batch.keys_B,
    )


def of_texts(logits: Tensor, batch: TextBatch) -> Tensor:
    """The loss of rows of one text, which for an answer is over the text's positions."""
    targets = batch.labels_BT
    if not isinstance(batch, AnswerBatch):
        return cross_entropy(logits, targets if isinstance(batch, TokenBatch) else targets[:, 0])
    lengths = ((batch.position_ids_BT == 0).cumsum(1) == 1).sum(1).tolist()
    return torch.stack(
        [
            cross_entropy(row[:n].T, ends[:2]) / 2
            for row, ends, n in zip(logits, targets, lengths, strict=True)
        ]
    ).sum()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    logits, targets = logits.flatten(0, -2).float(), targets.flatten()
    return nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
