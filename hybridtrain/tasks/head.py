"""A module with the model's head and the task's loss, which replaces the head in the last stage.

Its output is the loss, so that all logits never exist at once in any layout.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear, pad

from hybridtrain.runtime.collectives import Ranks, collective
from hybridtrain.tasks.linear_cross_entropy import HeadGradient, Transform

if TYPE_CHECKING:
    from hybridtrain.tasks.task import Task
    from hybridtrain.types import Batch


class Head(nn.Module):
    """Replaces `model_head`, a linear layer, and has its weight (V, D) and bias (V,). `scale`, `cap`: how
    the model makes logits of its output (Transform). `loss_chunk`: engine.loss_chunk.

    forward: (hidden (B, T, D), batch) -> the task's sums in the order of its weights, fp32,
    shape (number of sums,).
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, model_head: Any, *, scale: float, cap: float | None, task: Task, loss_chunk: int):
        super().__init__()
        self.weight, self.bias = model_head.weight, model_head.bias
        self.transform, self.task, self.loss_chunk = Transform(scale, cap), task, loss_chunk
        self.ranks: Ranks | None = None
        """Those that share the head: `weight` and `bias` are this rank's rows."""
        self.entries = model_head.weight.shape[0]
        """Rows of the whole head."""
        self.pairs_B2: Tensor | None = None
        """During a forward pass of a model that has them: logits of whether the second part of a row follows
        the first (0) or not (1)."""
        self._whole: Callable[[Tensor], Tensor] = _unchanged
        self._used: set[str] = set()
        self.gradients = {name: (HeadGradient(), HeadGradient()) for name in task.weights}
        """Name of a sum -> gradients of weight and bias from it, over all micro-batches in flight."""

    def share(self, ranks: Ranks, *, rows: bool, positions: bool) -> None:
        """With tensor parallelism: each rank has a part of the `rows`, and of the `positions` of the hidden
        states.
        """
        if rows:
            self.ranks = ranks
        if positions:
            self._whole = partial(collective, "whole", ranks=ranks)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """All logits, (B, T, V), fp32, for losses that are no cross-entropy, and for counting. They take much
        memory.
        """
        if self.ranks is None:
            return self.transform.of(linear(hidden_BTD, self.local("weight"), self.local("bias")))
        hidden_BTD = collective("copy", hidden_BTD, self.ranks)
        mine_BTv = linear(hidden_BTD, self.local("weight"), self.local("bias"))
        most = -(-self.entries // self.ranks.size)
        mine_BvT = pad(mine_BTv, (0, most - mine_BTv.shape[-1])).transpose(1, 2)
        whole_BTV = collective("whole", mine_BvT, self.ranks).transpose(1, 2)[..., : self.entries]
        return self.transform.of(whole_BTV)

    def local(self, name: str) -> Any:
        """This rank's part of weight or bias, or None."""
        parameter = getattr(self, name)
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter

    def gradients_of(self, name: str) -> tuple[HeadGradient, HeadGradient]:
        """The gradients of weight and bias from one of the task's sums.

        Raises TypeError for a second use in a forward pass.
        """
        if name in self._used:
            problem = "cross_entropy is called a second time for the sum"
            raise TypeError(
                f"{type(self.task).__name__}.loss: {problem} {name!r}; "
                "give each part a name of its own in `weights`"
            )
        self._used.add(name)
        return self.gradients[name]

    def clear(self) -> None:
        """Discard the gradients of forward passes without a backward pass."""
        for of_sum in self.gradients.values():
            for gradient in of_sum:
                gradient.clear()

    def forward(self, hidden_BTD: Tensor, batch: Batch, *of_pairs: Tensor) -> Tensor:
        self._used.clear()
        self.pairs_B2 = of_pairs[0] if of_pairs else None
        sums = self.task.loss(self._whole(hidden_BTD), batch, self)
        self.pairs_B2 = None
        for name in self.task.weights:
            shape = tuple(sums[name].shape) if name in sums else None
            if shape != (1,):
                problem = "is missing" if shape is None else f"has shape {shape}"
                raise TypeError(
                    f"{type(self.task).__name__}.loss: the sum {name!r} {problem}; "
                    "return a tensor of shape (1,) for each name in `weights`"
                )
        return torch.cat([sums[name] for name in self.task.weights])


def _unchanged(hidden: Tensor) -> Tensor:
    return hidden
