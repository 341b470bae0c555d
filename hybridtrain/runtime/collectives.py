"""Collectives of tensor parallelism inside the forward and backward pass, on plain tensors.

    name    forward pass             backward pass            a block begins and ends with
    copy    the same                 sum                      copy    ...  sum
    sum     sum                      the same
    gather  all positions            sum, own positions       gather  ...  scatter   (sequence parallelism)
    scatter sum, own positions       all positions
    split   own positions            all positions            where every rank has computed the same
    whole   all positions            own positions
    both    sum                      sum

Megatron-LM: arXiv 1909.08053 (copy, sum: f and g); sequence parallelism: arXiv 2205.05198.
B rows, T positions.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

_PASSES = {
    "copy": ("same", "sum"),
    "sum": ("sum", "same"),
    "gather": ("gather", "scatter"),
    "scatter": ("scatter", "gather"),
    "split": ("split", "gather"),
    "whole": ("gather", "split"),
    "both": ("sum", "sum"),
}


class Ranks(Protocol):
    """The ranks that share a model's layers, and this one's number. Tensors are (B, T, ...)."""

    rank: int
    size: int

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, the same on all."""

    def max(self, x: Tensor) -> Tensor:
        """The largest over ranks, the same on all."""

    def gather(self, x: Tensor) -> Tensor:
        """The positions of all ranks, in order: (B, size * T, ...)."""

    def scatter(self, x: Tensor) -> Tensor:
        """This rank's T / size positions of the sum over ranks."""


class GroupRanks:
    """Ranks that are processes of a group."""

    def __init__(self, group: dist.ProcessGroup):
        self.rank, self.size, self.name = group.rank(), group.size(), group.group_name
        self.gloo = dist.get_backend(group) == "gloo"

    def sum(self, x: Tensor) -> Tensor:
        ops = torch.ops._c10d_functional
        return ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", self.name))

    def max(self, x: Tensor) -> Tensor:
        ops = torch.ops._c10d_functional
        return ops.wait_tensor(ops.all_reduce(x.contiguous(), "max", self.name))

    def gather(self, x: Tensor) -> Tensor:
        ops = torch.ops._c10d_functional
        parts = ops.wait_tensor(ops.all_gather_into_tensor(x.contiguous(), self.size, self.name))
        return parts.unflatten(0, (self.size, x.shape[0])).transpose(0, 1).flatten(1, 2)

    def scatter(self, x: Tensor) -> Tensor:
        ops = torch.ops._c10d_functional
        parts = x.unflatten(1, (self.size, -1)).transpose(0, 1).contiguous()
        if self.gloo:  # its reduce-scatter takes two to three times as long
            rows = [parts.shape[1]] * self.size
            received = ops.all_to_all_single(parts.flatten(0, 1), rows, rows, self.name)
            return ops.wait_tensor(received).view(parts.shape).sum(0)
        return ops.wait_tensor(ops.reduce_scatter_tensor(parts.flatten(0, 1), "sum", self.size, self.name))


def collective(name: str, x: Tensor, ranks: Ranks) -> Tensor:
    """The result of one of the collectives above."""
    return _Collective.apply(x, ranks, *_PASSES[name])


class _Collective(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, there: str, back: str) -> Tensor:
        ctx.ranks, ctx.back = ranks, back
        return _run(there, x, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return _run(ctx.back, grad, ctx.ranks), None, None, None


def _run(name: str, x: Tensor, ranks: Ranks) -> Tensor:
    if name == "same":
        return x
    if name == "split":
        return x.unflatten(1, (ranks.size, -1)).select(1, ranks.rank).contiguous()
    if name == "sum":
        return ranks.sum(x)
    return ranks.gather(x) if name == "gather" else ranks.scatter(x)
