"""Adafactor (arXiv 1804.04235): Adam's second moment of a matrix from one number for each row and column.

    matrix     R, C: means of g^2 + 1e-30 over its rows and columns, averaged over steps;   V = R C / mean(R)
    vector     V: g^2 + 1e-30, averaged over steps;   step t counts 1 - t^-0.8 less than those before it
    u = g / sqrt(V);   u <- u / max(1, rms(u))
    w <- w - lr (u + decay w), or with optim.momentum:  m <- momentum m + (1 - momentum) lr u,
                                                        w <- w - m - lr decay w

As transformers' Adafactor with scale_parameter and relative_step off. Rows, columns and rms are those of a
whole parameter, as it is stored: ranks add the squares of their shards, in two collectives a step. Parameters
of more dimensions are matrices along the last two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hybridtrain.config.schema import OptimConfig
from hybridtrain.models.init import local_slices
from hybridtrain.optim.elementwise import Elementwise
from hybridtrain.optim.shards import LocalShard, is_first, wide
from hybridtrain.optim.stored import COLUMN, ROW, Formats, shape_of

_EPS, _EXPONENT, _MOST_RMS = 1e-30, -0.8, 1.0
VECTOR = "exp_avg_sq"


class Adafactor(Elementwise):
    """Adafactor over local shards."""

    def __init__(
        self,
        shards: list[LocalShard],
        settings: OptimConfig,
        formats: Formats,
        *,
        group: dist.ProcessGroup | None,
    ):
        """`group`: the ranks with shards of the same parameters, or replicas of them; None for one rank."""
        super().__init__(shards, settings, formats)
        self.group = group
        self.rows, self.columns = {}, {}
        """Shard -> this rank's part of the means over rows and columns of a matrix."""
        for item in shards:
            fields, shape = self.fields(item), item.parameter.shape
            options: Any = {
                "dtype": torch.promote_types(item.shard.dtype, torch.float32),
                "device": item.shard.device,
            }
            if len(shape) < 2:
                fields[VECTOR] = torch.zeros(item.shard.shape, **options)
                continue
            for field in (ROW, COLUMN):
                fields[field] = torch.zeros(shape_of(field, shape), **options)
            place = local_slices(item.parameter)
            self.rows[item.shard], self.columns[item.shard] = place[:-1], place[:-2] + place[-1:]

    @torch.no_grad()
    def step(self, *, lr: float, divide: Tensor, skip: Tensor) -> None:
        """As Elementwise.step (collective)."""
        self.begin()
        self.lr = lr
        if self.shards:
            self._average(divide=divide, skip=skip)
            for item, rms in zip(self.shards, self._rms(divide=divide), strict=True):
                if item.shard.grad is not None:
                    update = self._direction(item, divide=divide).div_((rms / _MOST_RMS).clamp(min=1.0))
                    self._apply(item, update, skip=skip)
        self.free()

    def _average(self, *, divide: Tensor, skip: Tensor) -> None:
        """Update the averages of the squares of all gradients (collective)."""
        sums: list[Tensor] = []
        for item in self.shards:
            squares = _squares(item, divide)
            if item.parameter.dim() < 2:
                self._lerp(item, VECTOR, squares, skip=skip)
                continue
            for field, dim, place in ((ROW, -1, self.rows), (COLUMN, -2, self.columns)):
                whole = torch.zeros_like(self.fields(item)[field])
                if is_first(item.parameter):
                    whole[place[item.shard]] = squares.sum(dim)
                sums.append(whole)
        totals = iter(self._added(sums))
        for item in self.shards:
            if item.parameter.dim() > 1:
                for field, dim in ((ROW, -1), (COLUMN, -2)):
                    self._lerp(item, field, next(totals) / item.parameter.shape[dim], skip=skip)

    def _lerp(self, item: LocalShard, field: str, mean: Tensor, *, skip: Tensor) -> None:
        """Let an average follow the mean of the squares of this step, of which it has a share of t^-0.8."""
        if item.shard.grad is None:
            return
        kept, step = self.fields(item)[field], self.fields(item)["step"] + 1
        new = kept.lerp(mean + _EPS, (step.double() ** _EXPONENT).to(kept.dtype))
        kept.copy_(torch.where(skip > 0, kept, new))

    def _rms(self, *, divide: Tensor) -> Sequence[Tensor]:
        """The root of the mean square of each parameter's update, before it is limited (collective)."""
        squares = [
            self._direction(item, divide=divide).square_().sum()
            if is_first(item.parameter) and item.shard.grad is not None
            else torch.zeros_like(divide)
            for item in self.shards
        ]
        totals = self._added(squares)
        return [
            (each / item.parameter.numel()).sqrt() for each, item in zip(totals, self.shards, strict=True)
        ]

    def _direction(self, item: LocalShard, *, divide: Tensor) -> Tensor:
        """This rank's part of a parameter's gradient over the root of its second moment, fp32 or fp64."""
        gradient, fields = _gradient(item, divide), self.fields(item)
        if VECTOR in fields:
            return gradient.mul_(fields[VECTOR].rsqrt())
        row = (fields[ROW] / fields[ROW].mean(-1, keepdim=True)).rsqrt_()[self.rows[item.shard]]
        column = fields[COLUMN].rsqrt()[self.columns[item.shard]]
        return gradient.mul_(row.unsqueeze(-1)).mul_(column.unsqueeze(-2))

    def _apply(self, item: LocalShard, update: Tensor, *, skip: Tensor) -> None:
        rate, decay = self.rates[item.shard]
        lr = self.lr * rate
        if not self.moments(item):
            self._subtract(item, update, lr=lr, decay=decay, skip=skip)
            return
        kept = self.fields(item)["exp_avg"]
        new = wide(kept).lerp(update * lr, 1 - self.settings.momentum)
        kept.copy_(torch.where(skip > 0, kept, new.to(kept.dtype)))
        self._subtract(item, new, lr=1.0, decay=lr * decay, skip=skip)

    def _added(self, sums: Sequence[Tensor]) -> Sequence[Tensor]:
        """Tensors of which each rank has a part, added over ranks."""
        if self.group is None or not sums:
            return sums
        total = torch.cat([each.flatten() for each in sums])
        dist.all_reduce(total, group=self.group)
        parts = total.split([each.numel() for each in sums])
        return [part.view_as(each) for part, each in zip(parts, sums, strict=True)]


def _gradient(item: LocalShard, divide: Tensor) -> Tensor:
    """The gradient in fp32 or fp64, of zeros where there is none, in memory of its own."""
    if item.shard.grad is None:
        return torch.zeros_like(wide(item.shard.data))
    return wide(item.shard.grad) / divide


def _squares(item: LocalShard, divide: Tensor) -> Tensor:
    return _gradient(item, divide).square_()
