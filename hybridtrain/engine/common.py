"""What both engines add up over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybridtrain.parallel.mesh import Mesh
from hybridtrain.runtime.flags import Flags
from hybridtrain.types import IGNORE_INDEX, Batch


def valid_tokens(batches: Sequence[Batch], *, mesh: Mesh, flags: Flags) -> Tensor:
    """Tokens with a label over the global batch, 0-d int64, known before any backward (collective). The ranks' flags are counted along."""
    tokens = torch.stack([(batch.labels_BT != IGNORE_INDEX).sum() for batch in batches]).sum()
    if mesh.coordinates["pp"] or mesh.coordinates["tp"]:
        tokens = torch.zeros_like(tokens)  # these ranks see the same rows; one of them counts
    counts = flags.beside(tokens)
    mesh.sum(counts, over="world")
    flags.sent(counts)
    return counts[0]


def mean_loss(mean: Tensor, *, tokens: Tensor) -> Tensor:
    """The loss of a step, 0-d; NaN without a single valid token: a mean over nothing is no loss of 0."""
    return torch.where(tokens > 0, mean, torch.nan)
