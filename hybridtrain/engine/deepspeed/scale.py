"""Our loss scale in the place of DeepSpeed's, so that both engines scale and skip alike.

DeepSpeed's own starts to count finite steps one step later, ends the run at the smallest scale, and has
neither our factors nor a faster descent at the start.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScalerBase

from hybridtrain.precision.loss_scale import LossScaler


class Scaler(LossScalerBase):
    """What DeepSpeed's ZeRO optimizers call."""

    def __init__(self, ours: LossScaler, *, dp: int):
        """`dp`: data ranks. DeepSpeed averages over them, so its loss is dp times ours, and its scale is
        ours / dp.
        """
        super().__init__(float(ours.scale) / dp)
        self.ours, self.dp, self.dynamic = ours, dp, ours.dynamic
        self.empty = torch.zeros(())
        """Whether the step has no targets; set before it."""

    def update_scale(self, overflow: Any) -> None:
        """Called once a step."""
        self.ours.update(torch.tensor(float(overflow)), empty=self.empty)
        self.read()

    def read(self) -> None:
        """Take the scale of `ours`."""
        self.cur_scale = float(self.ours.scale) / self.dp
