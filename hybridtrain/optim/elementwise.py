"""Updates element by element over local shards, of weights and moments in stored formats (stored.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridtrain.config.schema import OptimConfig
from hybridtrain.errors import PossiblyLocalError, refusal
from hybridtrain.models.init import local_slices
from hybridtrain.optim import stored
from hybridtrain.optim.checkpointed import BuiltIn, Fields
from hybridtrain.optim.shards import LocalShard, decay_of, rate_of
from hybridtrain.optim.stored import Formats
from hybridtrain.plan.optimizer_states import BLOCK, in_eight_bits
from hybridtrain.precision.rounding import key_of


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
                item.shard.data, whole=item.parameter.shape, moments=self.moments, formats=formats
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
        self._settings = {
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
        for item in self.shards:
            if item.shard.grad is not None:
                self._move(
                    item,
                    item.shard.grad,
                    self._fields[item.shard],
                    settings=self.settings,
                    divide=divide,
                    skip=skip,
                )
        self.free()

    def _move(
        self,
        item: LocalShard,
        gradient: Tensor,
        fields: Fields,
        *,
        settings: OptimConfig,
        divide: Tensor,
        skip: Tensor,
    ) -> None:
        """Update a shard and its state `fields` by the kind of `settings`, at its own rate and decay."""
        rate, decay = self._settings[item.shard]
        stored.update(
            item.shard.data,
            gradient,
            fields,
            settings=settings,
            formats=self.formats,
            where=self._places.get(item.shard),
            lr=self.lr * rate,
            decay=decay,
            divide=divide,
            skip=skip,
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
