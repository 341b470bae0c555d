"""What both engines add up over micro-batches and ranks. K: sums of the task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybridtrain.parallel.mesh import Mesh
from hybridtrain.runtime.flags import Flags
from hybridtrain.tasks.task import Task
from hybridtrain.types import Batch, Sums


def global_counts(batches: Sequence[Batch], *, task: Task, mesh: Mesh, flags: Flags) -> Tensor:
    """What each sum of the task is divided by: its targets in the global batch, int64 (K,), known before any backward (collective). The ranks' flags are counted along."""
    counts = [task.counts(batch) for batch in batches]
    total = torch.stack([torch.stack([count[name] for count in counts]).sum() for name in task.weights])
    if mesh.coordinates["pp"] or mesh.coordinates["tp"]:
        total = torch.zeros_like(total)  # these ranks see the same rows; one of them counts
    sums = flags.append_to(total)
    mesh.sum(sums, over="world")
    flags.copy_to_host(sums)
    return sums[: len(total)]


def loss_of(sums: Tensor, counts: Tensor, *, weights: Tensor) -> Tensor:
    """The loss of a step from (K,) each, 0-d; NaN without a single target: a mean over nothing is no loss of 0."""
    mean = (weights * sums / counts.clamp(min=1)).sum()
    return torch.where(counts.sum() > 0, mean, torch.nan)


def evaluated(sums: Tensor, counts: Tensor, *, task: Task) -> Sums:
    """What an evaluation hands out, of (K,) each. The host waits."""
    return Sums(dict(zip(task.weights, sums.tolist(), strict=True)), dict(zip(task.weights, counts.tolist(), strict=True)))
