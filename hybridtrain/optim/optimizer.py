"""The optimizer of optim.kind: fused AdamW, which clips, unscales and skips inside its kernel,
or a user's (user_optimizer.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybridtrain.config.schema import OptimConfig
from hybridtrain.optim.shards import LocalShard, Update, groups, like, local_shards
from hybridtrain.optim.user_optimizer import UserOptimizer

__all__ = ["AdamW", "adamw", "build", "local_shards"]


class AdamW(Update):
    """Fused AdamW over local shards (Decoupled Weight Decay Regularization, arXiv:1711.05101)."""

    def __init__(self, shards: list[LocalShard], settings: OptimConfig):
        super().__init__(shards)
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
        self.begin()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # GradScaler sets these attributes, too.
        self.optimizer.grad_scale, self.optimizer.found_inf = divide, skip  # type: ignore[attr-defined]
        self.optimizer.step()
        self.free()

    @torch.no_grad()
    def wanted(self, item: LocalShard, *, before: Tensor) -> Tensor | None:
        assert self.optimizer is not None
        state = self.optimizer.state[item.shard]
        (group,) = (
            each for each in self.optimizer.param_groups if any(p is item.shard for p in each["params"])
        )
        first, second = group["betas"]
        mean = state["exp_avg"].float() / (1 - first ** state["step"])
        deviation = (state["exp_avg_sq"].float() / (1 - second ** state["step"])).sqrt()
        return -group["lr"] * (mean / (deviation + group["eps"]) + group["weight_decay"] * before.float())

    def state(self) -> dict[str, Tensor]:
        """Optimizer state by key `optim.<name>.<field>`, as DTensors where the parameter is one.

        Created before the first step.
        """
        assert self.optimizer is not None or not self.shards
        result: dict[str, Tensor] = {}
        for item in self.shards:
            state = self.optimizer.state[item.shard]  # type: ignore[union-attr]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=item.shard.device)
                state["exp_avg"] = torch.zeros_like(item.shard.data)
                state["exp_avg_sq"] = torch.zeros_like(item.shard.data)
            for field, value in state.items():
                # Of the two copies of a tied matrix the first is saved, as for the weight itself.
                result.setdefault(
                    f"optim.{item.name}.{field}", value if field == "step" else like(value, item.parameter)
                )
        return result

    def copy_state(self, source: LocalShard, target: LocalShard) -> None:
        """Give `target` the same state as `source` (the two copies of a tied matrix)."""
        assert self.optimizer is not None
        for field, value in self.optimizer.state[source.shard].items():
            self.optimizer.state[target.shard][field].copy_(value)


def adamw(named: list[tuple[str, int, nn.Parameter]], settings: OptimConfig) -> torch.optim.AdamW:
    """torch's fused AdamW over (name, dimensions, parameter), sharded or not."""
    first, second = settings.betas
    return torch.optim.AdamW(
        groups(named, settings), lr=settings.lr, betas=(first, second), eps=settings.eps, fused=True
    )


def build(shards: list[LocalShard], settings: OptimConfig) -> Update:
    """The optimizer of optim.kind."""
    return AdamW(shards, settings) if settings.kind == "adamw" else UserOptimizer(shards, settings)
