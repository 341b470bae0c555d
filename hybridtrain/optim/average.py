"""An exponential moving average of the weights (optim.ema), sharded as they are, in fp32, or fp64 with
precision=fp64.

    average <- d average + (1 - d) weights,   d = min(optim.ema, (1 + t) / (10 + t)) at update t

The smaller d of the first updates lets it forget the initial weights. A skipped step changes nothing.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

from hybridtrain.optim.shards import ALL, LocalShard, Update, chunks, like, rows

PREFIX, COUNT = "ema.", "ema_updates"
"""Keys in a checkpoint: the average of each trained weight, and the number of updates."""


class Average:
    """The average of this rank's shards, each weight once."""

    def __init__(self, optimizer: Update, *, decay: float, device: torch.device):
        self.optimizer, self.decay = optimizer, decay
        self.items: dict[str, LocalShard] = {}
        for item in optimizer.shards:
            self.items.setdefault(item.name, item)
        self.of = {name: self._of_weights(item) for name, item in self.items.items()}
        self.updates = torch.zeros((), device=device)

    def _of_weights(self, item: LocalShard) -> Tensor:
        return self.optimizer.exact(item, ALL).view_as(item.shard).clone()

    @torch.no_grad()
    def update(self, *, skip: Tensor) -> None:
        """Called after each step; `skip`: 0-d, 1 if it made no update."""
        self.updates += 1 - skip
        # in double precision: in fp32, 1 - 0.9999 is off by 2e-4
        rate = (9 / (10 + self.updates.double())).clamp(min=1 - self.decay)
        for name, item in self.items.items():
            average = rows(self.of[name])
            for part in chunks(average):
                old = average[part]
                new = old.lerp(self.optimizer.exact(item, part), rate.to(old.dtype))
                old.copy_(torch.where(skip > 0, old, new))

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint: keys, and tensors that share memory with the average."""
        parts = {
            PREFIX + name: like(self.of[name], item.parameter, shape=item.parameter.shape)
            for name, item in self.items.items()
        }
        return {**parts, COUNT: self.updates}

    @torch.no_grad()
    def adopt(self, stored: Container[str]) -> None:
        """Called after a checkpoint with these keys was loaded: what it has no average of begins with its
        weights.
        """
        for name, item in self.items.items():
            if PREFIX + name not in stored:
                self.of[name].copy_(self._of_weights(item))
        if COUNT not in stored:
            self.updates.zero_()
