"""Exponent histograms: which share of some numbers a format cannot hold, at any scale. No torch.

    bin 0       zeros, and what is subnormal in float32
    bin b       magnitudes from 2^(b - 127) up to 2^(b - 126)
    bin 255     infinities and NaN

The bin of a number is the 8 exponent bits that it has as a float32. Histograms add up over micro-batches and
ranks, and multiplying all numbers by 2^k moves a histogram by k bins; so 256 integers answer for every format
and every power of two as a scale, on numbers that nobody kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hybridtrain.plan.formats import Number

BINS = 256
NON_FINITE = 255
_BIAS = 127


@dataclass(frozen=True)
class Shares:
    """Of all numbers, zeros included."""

    underflow: float
    """Those that are not zero and are rounded to it."""
    overflow: float
    """Finite ones above the largest of the format, by whole bins: those that share a bin with it do not
    count."""


def shares(histogram: Sequence[int], number: Number, *, scale: int) -> Shares:
    """Of the numbers of a histogram, (256,), each multiplied by 2^`scale` and cast to a number format.

    Exact for underflow: half of the least subnormal, below which a number is rounded to zero, is a power of
    two. Both are 0 without numbers.
    """
    total = sum(histogram)
    if not total:
        return Shares(0.0, 0.0)
    vanish = _exponent(number.smallest_subnormal) - 1 + _BIAS - scale  # the first bin that does not vanish
    exceed = _exponent(number.largest) + 1 + _BIAS - scale
    lost = sum(histogram[1 : min(max(vanish, 1), NON_FINITE)])
    above = sum(histogram[min(max(exceed, 1), NON_FINITE) : NON_FINITE])
    return Shares(lost / total, above / total)


def tensorwise_scale(histogram: Sequence[int], number: Number) -> int:
    """The k of the scale 2^k that brings the largest number to the highest exponent of the format; 0 without
    finite numbers that are not zero.
    """
    top = next((index for index in range(NON_FINITE - 1, 0, -1) if histogram[index]), None)
    return 0 if top is None else _exponent(number.largest) - (top - _BIAS)


def _exponent(value: float) -> int:
    """The e of 2^e <= value < 2^(e + 1)."""
    return math.frexp(value)[1] - 1
