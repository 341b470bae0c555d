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
from hybridtrain.optim.shards import LocalShard, Update, wide
from hybridtrain.optim.stored import Formats

_LINEAR, _CUBIC, _QUINTIC = 3.4445, -4.7750, 2.0315
_ITERATIONS, _EPS = 5, 1e-7
_RMS = 0.2


class Muon(Update):
    """Matrices by Muon, other parameters by AdamW."""

    def __init__(
        self,
        shards: list[LocalShard],
        settings: OptimConfig,
        formats: Formats,
        *,
        parts: Mapping[str, Parts],
        group: dist.ProcessGroup | None,
    ):
        """As Matrices; `parts`: of the whole model, of which this rank has the shards."""
        super().__init__(shards)
        of_adam = dataclasses.replace(settings, kind="adamw")
        self.matrices = Matrices(
            [item for item in shards if item.name in parts], settings, formats, parts=parts, group=group
        )
        self.others = Elementwise([item for item in shards if item.name not in parts], of_adam, formats)
        self.optimizer = None

    @torch.no_grad()
    def step(self, *, lr: float, divide: Tensor, skip: Tensor) -> None:
        self.begin()
        for part in (self.matrices, self.others):
            part.step(lr=lr, divide=divide, skip=skip)
        self.free()

    def _of(self, item: LocalShard) -> Elementwise:
        return self.matrices if item.name in self.matrices.parts else self.others

    def exact(self, item: LocalShard, part: slice) -> Tensor:
        return self._of(item).exact(item, part)

    def wanted(self, item: LocalShard, *, before: Tensor) -> Tensor | None:
        return self._of(item).wanted(item, before=before)

    def state(self) -> dict[str, Tensor]:
        return {**self.matrices.state(), **self.others.state()}

    def copy_state(self, source: LocalShard, target: LocalShard) -> None:
        self._of(source).copy_state(source, target)

    def prepare(self, stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        for part in (self.matrices, self.others):
            part.prepare(stored)

    def adopt(self, loaded: Mapping[str, Tensor]) -> None:
        for part in (self.matrices, self.others):
            part.adopt(loaded)


class Matrices(Elementwise):
    """The part of Muon for matrices: momenta over local shards, orthogonal updates of whole matrices."""

    def __init__(
        self,
        shards: list[LocalShard],
        settings: OptimConfig,
        formats: Formats,
        *,
        parts: Mapping[str, Parts],
        group: dist.ProcessGroup | None,
    ):
        """Collective over `group`: the ranks with the same shards, or replicas of them; None for one rank."""
        super().__init__(shards, settings, formats)
        self.parts, self.group = parts, group
        mine = [local_slices(item.parameter) for item in shards]
        self.held: list[list[Slices]] = [mine]
        """Rank of the group -> what it holds of each matrix."""
        if group is not None:
            self.held = [[] for _ in range(group.size())]
            dist.all_gather_object(self.held, mine, group=group)

    @torch.no_grad()
    def step(self, *, lr: float, divide: Tensor, skip: Tensor) -> None:
        """As Elementwise.step (collective)."""
        self.begin()
        self.lr = lr
        size = len(self.held)
        for first in range(0, len(self.shards), size):
            batch = self.shards[first : first + size]
            ahead = [self._ahead(item, divide=divide, skip=skip) for item in batch]
            for item, update in zip(batch, self._orthogonal(first, ahead), strict=True):
                self._apply(item, update, skip=skip)
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

    def _apply(self, item: LocalShard, update: Tensor, *, skip: Tensor) -> None:
        """Move the weights of a shard, in their format, by a part of an orthogonal matrix."""
        fields = {name: value for name, value in self.fields(item).items() if name != "momentum"}
        plain = dataclasses.replace(self.settings, kind="sgd", momentum=0.0, nesterov=False)
        self._move(item, update, fields, settings=plain, divide=torch.ones_like(skip), skip=skip)

    def _orthogonal(self, first: int, ahead: Sequence[Tensor]) -> list[Tensor]:
        """This rank's parts of the orthogonal matrices of a batch: at most one for each rank to own."""
        if self.group is None:
            return [self._update_of(self.shards[first], ahead[0])]
        rank, count = self.group.rank(), len(ahead)
        own = first + rank if rank < count else None
        # Of equal parts, which replicas have, the first is sent; all are sent back.
        sent = [
            tensor.numel() if self._is_first(rank, first + number) else 0
            for number, tensor in enumerate(ahead)
        ]
        sent += [0] * (self.group.size() - count)
        back = [tensor.numel() for tensor in ahead] + [0] * (self.group.size() - count)
        sizes = [0 if own is None else _size(held[own]) for held in self.held]
        firsts = [size if own is not None and self._is_first(at, own) else 0 for at, size in enumerate(sizes)]
        parts = [tensor for tensor, size in zip(ahead, sent, strict=False) if size]
        received = ahead[0].new_empty(sum(firsts))
        dist.all_to_all_single(received, _flat(parts, like=ahead[0]), firsts, sent, group=self.group)
        updates: list[Tensor] = []
        if own is not None:
            whole = ahead[0].new_zeros(self.shards[own].parameter.shape)
            for held, part in zip(self.held, received.split(firsts), strict=True):
                if part.numel():
                    whole[held[own]] = part.view(whole[held[own]].shape)
            update = self._update_of(self.shards[own], whole)
            updates = [update[held[own]] for held in self.held]
        result = ahead[0].new_empty(sum(back))
        dist.all_to_all_single(result, _flat(updates, like=ahead[0]), back, sizes, group=self.group)
        return [part.view_as(tensor) for part, tensor in zip(result.split(back), ahead, strict=False)]

    def _is_first(self, rank: int, number: int) -> bool:
        """Whether no rank before has the same part of a matrix."""
        return not any(held[number] == self.held[rank][number] for held in self.held[:rank])

    def _update_of(self, item: LocalShard, ahead: Tensor) -> Tensor:
        """The update of a whole parameter, by the matrices in it."""
        dim, sizes = self.parts[item.name]
        return torch.cat([_scaled(part) for part in ahead.split(sizes, dim=dim)], dim=dim)


def _size(slices: Slices) -> int:
    return int(torch.Size(each.stop - each.start for each in slices).numel())


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
