"""The dynamic loss scale: one number for the whole world, kept on the device, changed without synchronisation.

Down by backoff_factor (not below min_scale) after a step whose gradients were not finite, up by growth_factor after
growth_interval finite steps in a row. The update is torch's own `_amp_update_scale_`, which GradScaler uses.

The scale is what multiplies (loss sum / tokens of the global batch) in backward: the same number means the same under every layout and engine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridtrain.config.schema import PrecisionConfig

STORED, OLDER, TRACKER = "scaler.loss_scale", "scaler.scale", "scaler.growth_tracker"
"""Keys of a checkpoint. Version 0.1 wrote OLDER: a scale that multiplied the loss times its number of data ranks."""


class LossScaler:
    """`scale` multiplies the loss before backward; without loss scaling it stays 1."""

    def __init__(self, settings: PrecisionConfig, *, enabled: bool, device: torch.device):
        self.enabled, self.settings = enabled, settings
        self.scale = torch.tensor(settings.init_scale if enabled else 1.0, dtype=torch.float32, device=device)
        self.growth_tracker = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, nonfinite: Tensor, *, empty: Tensor) -> None:
        """Adjust after a step; unchanged after one without targets (`empty`). 0-d float tensors, 1 or 0, equal on all ranks."""
        if not self.enabled:
            return
        s, before = self.settings, (self.scale.clone(), self.growth_tracker.clone())
        torch._amp_update_scale_(self.scale, self.growth_tracker, nonfinite, s.growth_factor, s.backoff_factor, s.growth_interval)
        self.scale.clamp_(min=s.min_scale)
        for now, old in zip((self.scale, self.growth_tracker), before, strict=True):
            now.copy_(torch.where(empty > 0, old, now))

    def state(self) -> dict[str, Tensor]:
        """Tensors for the checkpoint; loading writes into them."""
        return {STORED: self.scale, TRACKER: self.growth_tracker} if self.enabled else {}

    def older_state(self) -> dict[str, Tensor]:
        """What loading fills besides, where a checkpoint of version 0.1 has it."""
        return {OLDER: torch.zeros_like(self.scale)} if self.enabled else {}

    def adopt(self, loaded: dict[str, Tensor], *, dp: int) -> None:
        """Take over what a checkpoint of version 0.1, written by `dp` data ranks, had in place of STORED."""
        if OLDER in loaded:
            self.scale.copy_(loaded[OLDER] * dp)
