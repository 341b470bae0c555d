"""Updates element by element over local shards, of weights and moments in stored formats (stored.py)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hybridtrain.config.schema import OptimConfig
from hybridtrain.errors import PossiblyLocalError, refusal
from hybridtrain.models.init import local_slices
from hybridtrain.optim import stored
from hybridtrain.optim.checkpointed import BuiltIn, Fields
from hybridtrain.optim.shards import LocalShard, decay_of, rate_of
from hybridtrain.optim.stored import COMPENSATION, Formats
from hybridtrain.plan.optimizer_states import BLOCK, in_eight_bits
from hybridtrain.precision.rounding import key_of

_AS_IT_IS = OptimConfig(kind="sgd", momentum=0.0)
"""Of an update that has been computed."""


class Elementwise(BuiltIn):
    """adamw, lion or sgd over local shards with the formats of precision.state and precision.rounding."""

    def __init__(self, shards: list[LocalShard], settings: OptimConfig, formats: Formats):
        """Raises UserError if a shard cuts a block of 8 bits."""
        super().__init__(shards, settings)
        self.formats = formats
        if formats.state == "8bit":
            _check_shards(shards)
        self._fields = {
            item.shard: stored.allocate(
                item.shard.data, whole=item.parameter.shape, moments=self.moments(item), formats=formats
            )
            for item in shards
        }
        self._places = {
            item.shard: stored.place(
                item.parameter.shape,
                local_slices(item.parameter),
                key=key_of(seed=formats.seed, name=item.name),
                device=item.shard.device,
            )
            for item in shards
            if formats.rounds(item.shard.dtype) == "stochastic"
        }
        self.rates = {
            item.shard: (
                rate_of(item.name, settings=settings),
                decay_of(item.name, item.parameter.dim(), settings=settings),
            )
            for item in shards
        }
        """Shard -> (learning rate relative to optim.lr, weight decay)."""

    @torch.no_grad()
    def step(self, *, lr: float, divide: Tensor, skip: Tensor) -> None:
        """Update with gradients divided by `divide`; no update if `skip` is 1. Frees the gradients.

        Both are 0-d tensors.
        """
        self.begin()
        self.lr = lr
        self._update(self.shards, divide=divide, skip=skip)
        self.free()

    def _update(self, shards: Iterable[LocalShard], *, divide: Tensor, skip: Tensor) -> None:
        """Update those of the shards that have gradients."""
        for item in shards:
            if item.shard.grad is not None:
                rate, decay = self.rates[item.shard]
                self._change(
                    item,
                    item.shard.grad,
                    self.fields(item),
                    settings=self.settings_of(item),
                    lr=self.lr * rate,
                    decay=decay,
                    divide=divide,
                    skip=skip,
                )

    def _subtract(self, item: LocalShard, update: Tensor, *, lr: float, decay: float, skip: Tensor) -> None:
        """Move the weights of a shard, in their format, by -lr (update + decay weights)."""
        fields = {
            name: self.fields(item)[name] for name in ("step", COMPENSATION) if name in self.fields(item)
        }
        one = torch.ones_like(skip)
        self._change(item, update, fields, settings=_AS_IT_IS, lr=lr, decay=decay, divide=one, skip=skip)

    def _change(self, item: LocalShard, gradient: Tensor, fields: Fields, **options: Any) -> None:
        """stored.update of a shard and its state `fields`."""
        stored.update(
            item.shard.data,
            gradient,
            fields,
            formats=self.formats,
            where=self._places.get(item.shard),
            **options,
        )

    def fields(self, item: LocalShard) -> Fields:
        return self._fields[item.shard]


def _check_shards(shards: list[LocalShard]) -> None:
    for item in shards:
        whole, here = item.parameter.shape, item.shard.shape
        if in_eight_bits(whole) and here[-1] % BLOCK:
            degree = whole[-1] // here[-1]
            problem = (
                f"parallel.tp={degree} cuts the rows of {item.name} ({whole[-1]:,} elements) into "
                f"{here[-1]:,}, which is no multiple of {BLOCK}"
            )
            error = refusal(
                "precision.state",
                "8bit",
                problem,
                allowed=f"a tp degree that leaves rows of a multiple of {BLOCK} elements",
                instead=f"parallel.tp of at most {max(1, whole[-1] // BLOCK)}, or precision.state=bf16",
            )
            raise PossiblyLocalError(str(error))
