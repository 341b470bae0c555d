"""Symmetric integers: a weight is code * scale, and neighbours in a row share a scale. `hybridtrain quantize`
stores weights so, and quantisation-aware training multiplies by them (qlinear.py).

Scales are rounded to bf16, as they are stored, before codes are chosen.
"""

from __future__ import annotations

from torch import Tensor

SMALLEST = 1e-30
"""A group of zeros has a scale too."""


def scale_of(amax: Tensor, largest: float) -> Tensor:
    """The scale, fp32, that brings the largest magnitude of a group to the largest code."""
    return (amax.clamp(min=SMALLEST) / largest).bfloat16().float()


def nearest(scaled: Tensor, largest: float) -> Tensor:
    """The codes nearest to weights that are divided by their scale; whole numbers in their dtype."""
    return scaled.round().clamp(-largest, largest)


def rounded(weight: Tensor, scale_NG: Tensor, largest: float) -> Tensor:
    """What a weight (N, K) is rounded to, fp32. Each row has G scales, of equally many neighbours."""
    groups = weight.float().unflatten(-1, (scale_NG.shape[1], -1))
    scale = scale_NG.unsqueeze(-1)
    return (nearest(groups / scale, largest) * scale).flatten(1)
