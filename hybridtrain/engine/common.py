"""What both engines agree on with other ranks: how the model is cut, and sums over micro-batches.

K: number of the task's sums.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hybridtrain.config.schema import ParallelConfig
from hybridtrain.errors import refusal
from hybridtrain.models.slicing import Slicing
from hybridtrain.parallel.mesh import Mesh, from_rank0
from hybridtrain.runtime.flags import Flags
from hybridtrain.tasks.head import Head
from hybridtrain.tasks.task import Task
from hybridtrain.types import Batch, Sums


def agreed_slicing(slicing: Slicing, *, parallel: ParallelConfig, tp: int) -> Slicing:
    """Rank 0's slicing: every host has searched for itself (collective). Raises UserError for one that cuts
    nothing.
    """
    if tp == 1:
        return slicing
    agreed: Slicing = from_rank0(slicing)
    if not agreed.cuts and not parallel.allow_replicated:
        raise refusal(
            "parallel.tp",
            tp,
            "no layer of this model could be cut: every rank would do the whole work",
            allowed="1",
            instead="parallel.tp=1, or parallel.allow_replicated=true",
        )
    return agreed


def global_counts(batches: Sequence[Batch], *, task: Task, mesh: Mesh, flags: Flags) -> Tensor:
    """The divisor of each of the task's sums over the global batch, int64 (K,) (collective).

    Exchanges the ranks' flags too.
    """
    counts = [task.counts(batch) for batch in batches]
    if missing := [name for name in task.weights if any(name not in count for count in counts)]:
        words = "is missing; return one for each name in `weights`"
        raise TypeError(f"{type(task).__name__}.counts: the sum {missing[0]!r} {words}")
    total = torch.stack([torch.stack([count[name] for count in counts]).sum() for name in task.weights])
    if mesh.coordinates["pp"] or mesh.coordinates["tp"]:
        total = torch.zeros_like(total)  # they have the rows of pp 0, tp 0
    sums = flags.append_to(total)
    mesh.sum(sums, over="world")
    flags.copy_to_host(sums)
    return sums[: len(total)]


def loss_of(sums: Tensor, counts: Tensor, *, weights: Tensor) -> Tensor:
    """The loss of a step, 0-d, from tensors (K,); NaN without targets."""
    mean = (weights * sums / counts.clamp(min=1)).sum()
    return torch.where(counts.sum() > 0, mean, torch.nan)


def named_sums(sums: Tensor, counts: Tensor, *, task: Task) -> Sums:
    """The result of an evaluation from tensors (K,). Waits for the device."""
    return Sums(
        dict(zip(task.weights, sums.tolist(), strict=True)),
        dict(zip(task.weights, counts.tolist(), strict=True)),
    )


@contextlib.contextmanager
def evaluating(engine: Any, task: Task) -> Iterator[None]:
    """Let the engine's eval_step compute the sums of another task."""
    heads = [module for _, module in engine.modules() if isinstance(module, Head)]
    own, weights = engine.task, engine.loss_weights

    def use(task: Task, weights: Tensor) -> None:
        engine.task, engine.loss_weights = task, weights
        for head in heads:
            head.task = task

    use(task, weights.new_zeros(len(task.weights)))
    try:
        yield
    finally:
        use(own, weights)
