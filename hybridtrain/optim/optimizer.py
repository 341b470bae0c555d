"""The optimizer of optim.kind: fused AdamW, which clips, unscales and skips inside its kernel; AdamW over
weights and moments in other formats (adam.py); or a user's (user_optimizer.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybridtrain.config.schema import OptimConfig
from hybridtrain.errors import PossiblyLocalError, refusal
from hybridtrain.models.init import local_slices
from hybridtrain.optim import adam
from hybridtrain.optim.adam import Formats
from hybridtrain.optim.checkpointed import Adam, Fields
from hybridtrain.optim.shards import LocalShard, Update, decays, groups, local_shards, rest_of_division
from hybridtrain.optim.user_optimizer import UserOptimizer
from hybridtrain.plan.optimizer_states import BLOCK, in_eight_bits
from hybridtrain.precision.rounding import key_of

__all__ = ["AdamW", "FormattedAdamW", "adamw", "build", "local_shards"]


class AdamW(Adam):
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
        for group in self.optimizer.param_groups:
            group["lr"] = lr
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


class FormattedAdamW(Adam):
    """AdamW over local shards with the formats of precision.state and precision.rounding (adam.py)."""

    def __init__(self, shards: list[LocalShard], settings: OptimConfig, formats: Formats):
        """Raises UserError if a shard cuts a block of 8 bits."""
        super().__init__(shards, settings)
        self.formats = formats
        if formats.state == "8bit":
            _check_shards(shards)
        self._fields = {
            item.shard: adam.allocate(item.shard.data, whole=item.parameter.shape, formats=formats)
            for item in shards
        }
        self._places = {
            item.shard: adam.place(
                item.parameter.shape,
                local_slices(item.parameter),
                key=key_of(seed=formats.seed, name=item.name),
                device=item.shard.device,
            )
            for item in shards
            if formats.rounds(item.shard.dtype) == "stochastic"
        }

    @torch.no_grad()
    def step(self, *, lr: float, divide: Tensor, skip: Tensor) -> None:
        """Update with gradients divided by `divide`; no update if `skip` is 1. Frees the gradients.

        Both are 0-d tensors.
        """
        self.begin()
        self.lr = lr
        for item in self.shards:
            decayed = decays(item.name, item.parameter.dim(), settings=self.settings)
            if item.shard.grad is not None:
                adam.update(
                    item.shard.data,
                    item.shard.grad,
                    self._fields[item.shard],
                    settings=self.settings,
                    formats=self.formats,
                    where=self._places.get(item.shard),
                    lr=lr,
                    decay=self.settings.weight_decay if decayed else 0.0,
                    divide=divide,
                    skip=skip,
                )
        self.free()

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


def adamw(named: list[tuple[str, int, nn.Parameter]], settings: OptimConfig) -> torch.optim.AdamW:
    """torch's fused AdamW over (name, dimensions, parameter), sharded or not."""
    first, second = settings.betas
    return torch.optim.AdamW(
        groups(named, settings), lr=settings.lr, betas=(first, second), eps=settings.eps, fused=True
    )


def build(shards: list[LocalShard], settings: OptimConfig, *, formats: Formats) -> Update:
    """The optimizer of optim.kind."""
    if settings.kind != "adamw":
        return UserOptimizer(shards, settings)
    if all(formats.plain(item.shard.dtype) for item in shards):
        return AdamW(shards, settings)
    return FormattedAdamW(shards, settings, formats)
