"""An exponential moving average of the weights (optim.ema), in fp32, sharded as they are.

    average <- d average + (1 - d) weights,   d = min(optim.ema, (1 + t) / (10 + t)) at update t

The smaller d of the first updates lets it forget the initial weights. A skipped step changes nothing.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

from hybridtrain.optim.shards import LocalShard, Update, like

PREFIX, COUNT = "ema.", "ema_updates"
"""Keys in a checkpoint: the average of each trained weight, and the number of updates."""


class Average:
    """The average of this rank's shards, each weight once."""

    def __init__(self, optimizer: Update, *, decay: float):
        self.optimizer, self.decay = optimizer, decay
        self.items: dict[str, LocalShard] = {}
        for item in optimizer.shards:
            self.items.setdefault(item.name, item)
        self.of = {name: optimizer.exact(item).clone() for name, item in self.items.items()}
        devices = [item.shard.device for item in self.items.values()]
        self.updates = torch.zeros((), device=devices[0] if devices else None)

    @torch.no_grad()
    def update(self, *, skip: Tensor) -> None:
        """Called after each step; `skip`: 0-d, 1 if it made no update."""
        self.updates += 1 - skip
        rate = 1 - ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)
        for name, item in self.items.items():
            average = self.of[name]
            moved = average.lerp(self.optimizer.exact(item), rate.to(average.dtype))
            average.copy_(torch.where(skip > 0, average, moved))

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
                self.of[name].copy_(self.optimizer.exact(item))
        if COUNT not in stored:
            self.updates.zero_()
