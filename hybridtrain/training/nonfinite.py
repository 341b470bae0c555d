"""Ends a run whose losses or gradients stay non-finite, with what it was and advice that fits."""

from __future__ import annotations

import math

import torch

from hybridtrain.config.schema import Config
from hybridtrain.errors import UserError
from hybridtrain.precision.rules import has_dynamic_scale, has_loss_scale
from hybridtrain.training.callbacks import StepInfo
from hybridtrain.types import StepResult


class NonFiniteCheck:
    """Counts steps on the device, and reads the counts only when the host waits anyway."""

    def __init__(self, config: Config, *, new_run: bool):
        """`new_run`: starts at step 0."""
        self.limit, self.new_run = config.train.max_nonfinite, new_run
        self.precision, self.scaled = config.precision, has_loss_scale(config.precision)
        self.dynamic = has_dynamic_scale(config.precision)
        self.steps, self.unread = 0, 0
        self.counts: torch.Tensor | None = None
        """(non-finite steps in a row, those of them that a lower loss scale would not help), int64, (2,)."""

    def __call__(self, info: StepInfo, *, wait: bool) -> None:
        """Count a step. Reads the counts if `wait`, or if one may be at the limit. Raises UserError."""
        self._count(info.result)
        self.unread, self.steps = self.unread + 1, self.steps + 1
        if not (wait or self.unread >= self.limit):
            return
        self.unread = 0
        assert self.counts is not None
        skipped, stuck = self.counts.tolist()
        if stuck >= self.limit:
            raise self._stopped(info, stuck)
        if info.last and self.new_run and skipped == self.steps:
            raise self._untrained(info)

    def _count(self, result: StepResult) -> None:
        skipped = result.skipped > 0
        stuck = skipped
        if self.dynamic:  # a loss is computed without the scale
            stuck = skipped & ((result.loss_scale <= self.precision.min_scale) | ~torch.isfinite(result.loss))
        now = torch.stack([skipped, stuck])
        self.counts = now.long() if self.counts is None else (self.counts + 1) * now

    def _stopped(self, info: StepInfo, count: int) -> UserError:
        what, were = _what(info.result)
        return UserError(
            f"train.max_nonfinite={self.limit}: "
            f"the {what} of {count} steps in a row, up to step {info.step}, {were} not finite "
            f"({self._facts(info.result)}); no update was made in them\n"
            f"  allowed: fewer than {self.limit} such steps in a row\n"
            f"  try:     {self._advice(what)}; the last checkpoint is from before or within them"
        )

    def _untrained(self, info: StepInfo) -> UserError:
        what, were = _what(info.result)
        return UserError(
            f"train.steps={self.steps}: "
            f"the {what} of all {self.steps} steps {were} not finite ({self._facts(info.result)}), "
            f"so no update was made\n"
            f"  allowed: a run with at least one update\n  try:     {self._advice(what)}"
        )

    def _facts(self, result: StepResult) -> str:
        """What is known of the last step, in the message."""
        scale = f", loss scale {float(result.loss_scale):,.15g}" if self.scaled else ""
        return f"loss {float(result.loss):.4g}{scale}"

    def _advice(self, what: str) -> str:
        if not self.scaled:
            return "a lower optim.lr, optim.clip=1.0, a longer schedule.warmup_steps"
        wider = "precision=bf16_mixed, which has fp32's range and needs no loss scale"
        if self.precision.kind != "fp16_mixed":
            wider = "a wider precision.compute than fp16, for the layer that it names in precision.rules"
        if what == "loss":  # an overflow in the forward pass
            return f"{wider}, or a lower optim.lr; no loss scale makes a loss finite"
        if not self.dynamic:
            return f"{wider}, a lower precision.static_scale, or precision.static_scale=null, which adapts it"
        return f"{wider}, a lower precision.min_scale or optim.lr"


def _what(result: StepResult) -> tuple[str, str]:
    """(what of a skipped step is not finite, its verb). A non-finite loss makes every gradient so."""
    return ("gradients", "were") if math.isfinite(float(result.loss)) else ("loss", "was")
