"""Muon: matrices inside layers move by their momentum, made orthogonal; everything else by AdamW.

    m <- momentum m + (1 - momentum) g;   u = g + momentum (m - g), or m without nesterov
    w <- w - lr (0.2 sqrt(max(rows, columns)) O(u) + decay w)

O(u): the nearest matrix with orthogonal rows or columns, by five Newton-Schulz iterations in fp32 (Jordan et
al. 2024, "Muon"). The factor gives updates the size of AdamW's, so that its rate fits (arXiv 2502.16982).

A rank holds a part of a matrix. Momenta are sent to an owner, which sends back the parts of O(u): one matrix
for each rank at a time, each rank another, so that the work is shared, and the result is that of one process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hybridtrain.config.schema import OptimConfig
from hybridtrain.models.init import Slices, local_slices
from hybridtrain.optim.elementwise import Elementwise
from hybridtrain.optim.matrices import Parts
from hybridtrain.optim.shards import LocalShard, wide
from hybridtrain.optim.stored import Formats

_LINEAR, _CUBIC, _QUINTIC = 3.4445, -4.7750, 2.0315
_ITERATIONS, _EPS = 5, 1e-7
_RMS = 0.2


class Muon(Elementwise):
    """Matrices by Muon: momenta over local shards, orthogonal updates of whole matrices; others by AdamW."""

    def __init__(
        self,
        shards: list[LocalShard],
        settings: OptimConfig,
        formats: Formats,
        *,
        parts: Mapping[str, Parts],
        group: dist.ProcessGroup | None,
    ):
        """Collective over `group`: the ranks with the same shards, or replicas of them; None for one rank.
        `parts`: of the whole model, of which this rank has the shards.
        """
        self.parts, self.group = parts, group
        self._adam = dataclasses.replace(settings, kind="adamw")
        super().__init__(shards, settings, formats)
        self.matrices = [item for item in shards if item.name in parts]
        mine = [local_slices(item.parameter) for item in self.matrices]
        self.held: list[list[Slices]] = [mine]
        """Rank of the group -> what it holds of each matrix."""
        if group is not None:
            self.held = [[] for _ in range(group.size())]
            dist.all_gather_object(self.held, mine, group=group)
        self.sent = [_sizes_of_distinct(held) for held in zip(*self.held, strict=True)]
        """Matrix -> elements of it that each rank of the group sends."""

    def settings_of(self, item: LocalShard) -> OptimConfig:
        return self.settings if item.name in self.parts else self._adam

    @torch.no_grad()
    def step(self, *, lr: float, divide: Tensor, skip: Tensor) -> None:
        """As Elementwise.step (collective)."""
        self.begin()
        self.lr = lr
        size = len(self.held)
        for first in range(0, len(self.matrices), size):
            batch = self.matrices[first : first + size]
            ahead = [self._ahead(item, divide=divide, skip=skip) for item in batch]
            for item, update in zip(batch, self._orthogonal(first, ahead), strict=True):
                rate, decay = self.rates[item.shard]
                self._subtract(item, update, lr=lr * rate, decay=decay, skip=skip)
        self._update([item for item in self.shards if item.name not in self.parts], divide=divide, skip=skip)
        self.free()

    def _ahead(self, item: LocalShard, *, divide: Tensor, skip: Tensor) -> Tensor:
        """Update the momentum; returns what is to be made orthogonal, in fp32 or fp64. A matrix without a
        gradient moves on, with one of zeros: ranks do not know of each other's.
        """
        momentum, kept = self.settings.momentum, self.fields(item)["momentum"]
        old = wide(kept)
        gradient = torch.zeros_like(old) if item.shard.grad is None else wide(item.shard.grad) / divide
        new = old.lerp(gradient, 1 - momentum)
        kept.copy_(torch.where(skip > 0, kept, new.to(kept.dtype)))
        return gradient.lerp(new, momentum) if self.settings.nesterov else new

    def _orthogonal(self, first: int, ahead: Sequence[Tensor]) -> list[Tensor]:
        """This rank's parts of the orthogonal matrices of a batch: at most one for each rank to own."""
        if self.group is None:
            return [self._update_of(self.matrices[first], ahead[0])]
        rank, count = self.group.rank(), len(ahead)
        idle = [0] * (len(self.held) - count)
        own = first + rank if rank < count else None
        whole = self._collected(own, ahead, sent=[each[rank] for each in self.sent[first : first + count]])
        updates: list[Tensor] = []
        if own is not None and whole is not None:
            update = self._update_of(self.matrices[own], whole)
            del whole
            updates = [update[held[own]] for held in self.held]
        sizes = [part.numel() for part in updates] or [0] * len(self.held)
        back = [tensor.numel() for tensor in ahead]
        result = ahead[0].new_empty(sum(back))
        dist.all_to_all_single(result, _flat(updates, like=ahead[0]), back + idle, sizes, group=self.group)
        return [part.view_as(tensor) for part, tensor in zip(result.split(back), ahead, strict=True)]

    def _collected(self, own: int | None, ahead: Sequence[Tensor], *, sent: list[int]) -> Tensor | None:
        """The matrix of this number, of the parts that ranks send; None if this rank owns none. `sent`:
        elements of each part that this rank sends.
        """
        parts = [tensor for tensor, size in zip(ahead, sent, strict=True) if size]
        firsts = [0] * len(self.held) if own is None else self.sent[own]
        received, idle = ahead[0].new_empty(sum(firsts)), [0] * (len(self.held) - len(ahead))
        dist.all_to_all_single(received, _flat(parts, like=ahead[0]), firsts, sent + idle, group=self.group)
        if own is None:
            return None
        whole = received.new_zeros(self.matrices[own].parameter.shape)
        for held, part in zip(self.held, received.split(firsts), strict=True):
            if part.numel():
                whole[held[own]] = part.view(whole[held[own]].shape)
        return whole

    def _update_of(self, item: LocalShard, ahead: Tensor) -> Tensor:
        """The update of a whole parameter, by the matrices in it."""
        dim, sizes = self.parts[item.name]
        return torch.cat([_scaled(part) for part in ahead.split(sizes, dim=dim)], dim=dim)


def _size(slices: Slices) -> int:
    return int(torch.Size(each.stop - each.start for each in slices).numel())


def _sizes_of_distinct(held: Sequence[Slices]) -> list[int]:
    """Sizes of parts of a matrix, 0 for one that is equal to an earlier one."""
    keys = [tuple((each.start, each.stop) for each in part) for part in held]
    first = {key: number for number, key in reversed([*enumerate(keys)])}
    return [_size(part) if first[keys[number]] == number else 0 for number, part in enumerate(held)]


def _flat(tensors: Sequence[Tensor], *, like: Tensor) -> Tensor:
    return torch.cat([like.new_empty(0), *(tensor.reshape(-1) for tensor in tensors)])


def _scaled(ahead: Tensor) -> Tensor:
    """The update of a matrix, or of several along the first of three dimensions."""
    return orthogonal(ahead) * (_RMS * max(ahead.shape[-2:]) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """Nearly orthogonal rows or columns: singular values of about 0.7 to 1.2. (..., rows, columns), fp32."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + _EPS)
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = _LINEAR * x + (_CUBIC * square + _QUINTIC * square @ square) @ x
    return x.mT if tall else x
