"""The dynamic loss scale: one number for all ranks, on the device, updated without synchronization.

It is multiplied by backoff_factor (not below min_scale) after a step with non-finite gradients, and by
growth_factor after growth_interval finite steps in a row, by torch's `_amp_update_scale_`, as in GradScaler.

In backward the scale multiplies (sum of losses / tokens of the global batch), so it does not depend
on layout or engine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridtrain.config.schema import PrecisionConfig

STORED, OLDER, TRACKER = "scaler.loss_scale", "scaler.scale", "scaler.growth_tracker"
"""Keys in a checkpoint. Version 0.1 wrote OLDER instead of STORED: the scale divided by the
number of data ranks."""


class LossScaler:
    """`scale` multiplies the loss before backward; without loss scaling it is 1."""

    def __init__(self, settings: PrecisionConfig, *, enabled: bool, device: torch.device):
        self.enabled, self.settings = enabled, settings
        self.scale = torch.tensor(settings.init_scale if enabled else 1.0, dtype=torch.float32, device=device)
        self.growth_tracker = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, nonfinite: Tensor, *, empty: Tensor) -> None:
        """Update after a step; no change if it had no targets (`empty`).

        Both: 0-d float tensors, 1 or 0, equal on all ranks.
        """
        if not self.enabled:
            return
        s, before = self.settings, (self.scale.clone(), self.growth_tracker.clone())
        torch._amp_update_scale_(
            self.scale, self.growth_tracker, nonfinite, s.growth_factor, s.backoff_factor, s.growth_interval
        )
        self.scale.clamp_(min=s.min_scale)
        for now, old in zip((self.scale, self.growth_tracker), before, strict=True):
            now.copy_(torch.where(empty > 0, old, now))

    def state(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint; loading writes into them."""
        return {STORED: self.scale, TRACKER: self.growth_tracker} if self.enabled else {}

    def older_state(self) -> dict[str, Tensor]:
        """Tensors to load from a checkpoint of version 0.1."""
        return {OLDER: torch.zeros_like(self.scale)} if self.enabled else {}

    def adopt(self, loaded: dict[str, Tensor], *, dp: int) -> None:
        """Set the scale from a checkpoint of version 0.1, written by `dp` data ranks."""
        if OLDER in loaded:
            self.scale.copy_(loaded[OLDER] * dp)
