"""The loss scale: one number for all ranks, on the device, updated without synchronization.

    dynamic   finite step           x growth_factor after growth_interval of them in a row
              non-finite step       x backoff_factor, not below min_scale, from the `hysteresis`-th since the
                                    last growth on
              none was finite yet   x backoff_factor at each, or to the square root, not below FAST, if that
                                    is less
    static    never changes

In backward the scale multiplies (sum of losses / tokens of the global batch), and reductions add gradients
up: scales and skipped steps do not depend on layout or engine. Growth and hysteresis are those of Megatron's
DynamicGradScaler.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hybridtrain.config.schema import PrecisionConfig
from hybridtrain.precision.rules import has_dynamic_scale, has_loss_scale

STORED, OLDER = "scaler.loss_scale", "scaler.scale"
"""Keys in a checkpoint. Version 0.1 wrote OLDER instead of STORED: the scale divided by the
number of data ranks."""
FINITE, NONFINITE = "scaler.growth_tracker", "scaler.nonfinite_steps"
"""Keys of the counters of a dynamic scale; version 0.1 wrote only the first."""
FAST = 2.0**16
"""Halving the exponent (2^100, 2^50, 2^25, 2^16) finds the size of the scale in a few steps, but may miss it
by as many bits as it keeps. Not below the usual first scale: from 2^16 to 2^8 would take 16,000 steps to grow
back."""


class LossScaler:
    """`scale` multiplies the loss before backward; without loss scaling it is 1.

    An update replaces the tensors, so that those taken before keep their values.
    """

    def __init__(self, settings: PrecisionConfig, *, device: torch.device):
        self.enabled, self.settings = has_loss_scale(settings), settings
        self.dynamic = has_dynamic_scale(settings)
        first = settings.init_scale if self.dynamic else settings.static_scale if self.enabled else 1.0
        self.scale = torch.tensor(first, dtype=torch.float32, device=device)
        self.finite = torch.zeros((), dtype=torch.int32, device=device)
        """Finite steps in a row since the scale grew."""
        self.nonfinite = torch.full((), -1, dtype=torch.int32, device=device)
        """Non-finite steps since the scale grew; -1 before the first finite step."""

    def update(self, nonfinite: Tensor, *, empty: Tensor) -> None:
        """Update after a step; no change if it had no targets (`empty`).

        Both: 0-d float tensors, 1 or 0, equal on all ranks.
        """
        if not self.dynamic:
            return
        before = (self.scale, self.finite, self.nonfinite)
        after = self._after(nonfinite > 0)
        self.scale, self.finite, self.nonfinite = (
            torch.where(empty > 0, old, new) for old, new in zip(before, after, strict=True)
        )

    def _after(self, bad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(scale, finite, nonfinite) after a step with targets."""
        s, started = self.settings, self.nonfinite >= 0
        finite, failures = self.finite + 1, self.nonfinite + started  # if the step is, or is not
        lower, higher = self.scale * s.backoff_factor, self.scale * s.growth_factor
        fast = torch.minimum(lower, self.scale.sqrt().clamp(min=FAST))
        lower = torch.where(started, lower, fast).clamp(min=s.min_scale)
        lower = torch.where(started & (failures < s.hysteresis), self.scale, lower)
        grow = finite >= s.growth_interval
        higher = torch.where(grow & torch.isfinite(higher), higher, self.scale)
        return (
            torch.where(bad, lower, higher),
            torch.where(bad | grow, 0, finite),
            torch.where(bad, failures, torch.where(grow, 0, self.nonfinite.clamp(min=0))),
        )

    def state(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint; loading writes into them."""
        scale = {STORED: self.scale} if self.enabled else {}
        return scale | ({FINITE: self.finite, NONFINITE: self.nonfinite} if self.dynamic else {})

    def older_state(self) -> dict[str, Tensor]:
        """Tensors to load from a checkpoint of version 0.1."""
        return {OLDER: torch.zeros_like(self.scale)} if self.enabled else {}

    def adopt(self, loaded: Mapping[str, Tensor], *, dp: int) -> None:
        """Complete the state after `loaded` was read from a checkpoint.

        `dp`: number of data ranks that wrote it, if version 0.1 did.
        """
        if OLDER in loaded:
            self.scale.copy_(loaded[OLDER] * dp)
        if loaded.keys() & {STORED, OLDER} and NONFINITE not in loaded:
            self.nonfinite.zero_()
        if self.enabled and not self.dynamic:
            assert self.settings.static_scale is not None
            self.scale.fill_(self.settings.static_scale)
