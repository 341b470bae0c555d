"""The optimizer of optim.kind: fused AdamW, which clips, unscales and skips inside its kernel; the others,
and AdamW over weights and moments in other formats (stored.py); or a user's (user_optimizer.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hybridtrain import registry
from hybridtrain.config.schema import OptimConfig
from hybridtrain.optim.adafactor import Adafactor
from hybridtrain.optim.checkpointed import BuiltIn, Fields
from hybridtrain.optim.elementwise import Elementwise
from hybridtrain.optim.matrices import Parts
from hybridtrain.optim.muon import Muon
from hybridtrain.optim.shards import (
    LocalShard,
    Update,
    groups,
    local_shards,
    rest_of_division,
    set_rate,
)
from hybridtrain.optim.stored import Formats
from hybridtrain.optim.user_optimizer import UserOptimizer

__all__ = ["AdamW", "Elementwise", "adamw", "build", "local_shards"]


class AdamW(BuiltIn):
    """Fused AdamW over local shards (Decoupled Weight Decay Regularization, arXiv:1711.05101)."""

    def __init__(self, shards: list[LocalShard], settings: OptimConfig):
        super().__init__(shards, settings)
        self.optimizer = (
            adamw([(item.name, item.parameter.dim(), item.shard) for item in shards], settings)
            if shards
            else None
        )

    @torch.no_grad()
    def step(self, *, lr: float, divide: Tensor, skip: Tensor) -> None:
        """Update with gradients divided by `divide`; no update if `skip` is 1. Frees the gradients.

        Both are 0-d tensors.
        """
        if self.optimizer is None:
            return
        gradients = self.begin()
        self.lr = lr
        set_rate(self.optimizer, lr)
        # GradScaler sets these attributes, too.
        divide = rest_of_division(gradients, divide)
        self.optimizer.grad_scale, self.optimizer.found_inf = divide, skip  # type: ignore[attr-defined]
        self.optimizer.step()
        self.free()

    def fields(self, item: LocalShard) -> Fields:
        assert self.optimizer is not None
        state = self.optimizer.state[item.shard]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=item.shard.device)
            state["exp_avg"] = torch.zeros_like(item.shard.data)
            state["exp_avg_sq"] = torch.zeros_like(item.shard.data)
        return state


def adamw(named: list[tuple[str, int, nn.Parameter]], settings: OptimConfig) -> torch.optim.AdamW:
    """torch's fused AdamW over (name, dimensions, parameter), sharded or not."""
    first, second = settings.betas
    return torch.optim.AdamW(
        groups(named, settings), lr=settings.lr, betas=(first, second), eps=settings.eps, fused=True
    )


def build(
    shards: list[LocalShard],
    settings: OptimConfig,
    *,
    formats: Formats,
    parts: Mapping[str, Parts],
    group: dist.ProcessGroup | None,
) -> Update:
    """The optimizer of optim.kind. Collective over `group`, which muon and adafactor need;
    `parts`: for muon, see muon.py.
    """
    if settings.kind not in registry.BUILT_IN["optimizer"]:
        return UserOptimizer(shards, settings)
    if settings.kind == "adamw" and all(formats.plain(item.shard.dtype) for item in shards):
        return AdamW(shards, settings)
    if settings.kind == "muon":
        return Muon(shards, settings, formats, parts=parts, group=group)
    if settings.kind == "adafactor":
        return Adafactor(shards, settings, formats, group=group)
    return Elementwise(shards, settings, formats)
