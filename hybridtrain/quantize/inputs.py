"""What goes into linear layers: seen on calibration rows, and rounded where a scheme says so.

M tokens, K inputs, N outputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hybridtrain.plan.formats import E4M3, E5M2, INT8, Number
from hybridtrain.precision.round import dtype_of, round_to
from hybridtrain.quantize.schemes import Scheme

_NUMBERS = {"int": INT8, "e4m3": E4M3, "e5m2": E5M2}
_KEPT = 1 << 18
"""Values that are kept of each batch to find a scale."""
_SHARES = torch.linspace(0.4, 1.0, 61)
"""Of the largest value: candidates for the largest that does not saturate."""
_PERCENTILE = 0.999
_TINY = 1e-30


class Seen:
    """Sums over the inputs (M, K) of a linear layer, fp32."""

    def __init__(self, scheme: Scheme):
        self.scheme = scheme
        self.tokens = 0
        self.hessian: Tensor = torch.zeros(())
        """x^T x (K, K)."""
        self._sum: Tensor = torch.zeros(())
        self._largest: Tensor = torch.zeros(())
        self._kept: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Add a batch."""
        x_MK = x.detach().reshape(-1, x.shape[-1]).float()
        self.tokens += len(x_MK)
        self.hessian = self.hessian.to(x_MK.device) + x_MK.t() @ x_MK
        self._sum = self._sum.to(x_MK.device) + x_MK.sum(0)
        if self.scheme.inputs in ("minmax", "percentile", "mse"):
            self._largest = torch.maximum(self._largest.to(x_MK.device), x_MK.abs().max())
            self._kept.append(x_MK.flatten()[:: _coprime(-(-x_MK.numel() // _KEPT), x_MK.shape[1])].cpu())

    def determines(self, inputs: int) -> bool:
        """Whether there were as many tokens as a weight has columns."""
        return self.tokens >= inputs

    @property
    def mean(self) -> Tensor:
        """Of each input, (K,)."""
        return self._sum / self.tokens

    def error(self, rest: Tensor, weight: Tensor, *, bias: Tensor | None) -> float:
        """Mean square of what a weight's error `rest` (N, K) adds to the outputs, less a bias, by that of the
        outputs."""
        added = ((rest @ self.hessian) * rest).sum()
        if bias is not None:  # the mean of each output's error is taken away
            added = added - self.tokens * bias.square().sum()
        whole = ((weight @ self.hessian) * weight).sum()
        return (added / whole.clamp(min=_TINY)).item()

    def scale(self) -> Tensor | None:
        """The scale of inputs that share one, 0-d."""
        if not self._kept:
            return None
        number, values = _NUMBERS[self.scheme.codes], torch.cat(self._kept)
        largest = self._largest.cpu()
        if self.scheme.inputs == "percentile":
            place = max(1, round(_PERCENTILE * len(values)))
            largest = values.abs().kthvalue(place).values
        if self.scheme.inputs == "mse":
            tried = [(_squared_error(values, largest * share, number), share) for share in _SHARES]
            largest = largest * min(tried, key=lambda each: each[0])[1]
        return (largest / number.largest).clamp(min=_TINY).bfloat16().float()


def _coprime(step: int, inputs: int) -> int:
    """The smallest step from this on that meets all inputs in turn."""
    return next(each for each in itertools.count(step) if math.gcd(each, inputs) == 1)


def _squared_error(values: Tensor, largest: Tensor, number: Number) -> float:
    scale = (largest / number.largest).clamp(min=_TINY)
    return (round_to(values / scale, number).float() * scale - values).square().sum().item()


def rounding(scheme: Scheme, scale: Tensor | None) -> Callable[[Any, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A hook before a linear layer that rounds what goes into it, in its dtype, as compressed-tensors does.
    `scale`: None for one of each token.
    """
    whole = scheme.codes == "int"
    number = _NUMBERS[scheme.codes]
    low, high = -number.largest - whole, number.largest

    def hook(module: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # noqa: ARG001 - a hook's signature
        x = given[0]
        here = x.abs().amax(-1, keepdim=True) / ((high - low) / 2) if scale is None else scale.to(x)
        here = torch.where(here == 0, torch.finfo(x.dtype).eps, here)
        scaled = (x / here).clamp(low, high)
        rounded = scaled.round() if whole else scaled.to(dtype_of(number)).to(x.dtype)
        return (rounded * here, *given[1:])

    return hook
