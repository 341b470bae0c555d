"""What both engines add up over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybridtrain.parallel.mesh import Mesh
from hybridtrain.types import IGNORE_INDEX, Batch


def valid_tokens(batches: Sequence[Batch], *, mesh: Mesh) -> Tensor:
    """Tokens with a label over the global batch, 0-d int64, known before any backward (collective)."""
    tokens = torch.stack([(batch.labels_BT != IGNORE_INDEX).sum() for batch in batches]).sum()
    if mesh.coordinates["pp"]:
        tokens = torch.zeros_like(tokens)  # pipeline ranks see the same rows; one of them counts
    mesh.sum(tokens, over="loss")
    return tokens


def mean_loss(mean: Tensor, *, tokens: Tensor) -> Tensor:
    """The loss of a step, 0-d; NaN without a single valid token: a mean over nothing is no loss of 0."""
    return torch.where(tokens > 0, mean, torch.nan)
