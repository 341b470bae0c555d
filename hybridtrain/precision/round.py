"""Rounding to a number format of plan/formats.py."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridtrain.plan.formats import TF32, Number

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
}


def dtype_of(number: Number) -> torch.dtype:
    """torch's dtype that holds a number format."""
    return _DTYPES[number.dtype]


def round_to(x: Tensor, number: Number) -> Tensor:
    """`x` rounded to the nearest number of a format, in its dtype; ties to even.

    The formats with scales saturate: values beyond the largest become that. NaN stays NaN (an infinite value
    makes its scale 0, and so becomes NaN), but for integers, which have none: there the scale is NaN.
    """
    dtype = dtype_of(number)
    if number is TF32:
        return _tf32(x)
    if number.exponent_bits == 0:
        return x.round().clamp(-number.largest, number.largest).to(dtype)
    if number.bits == 8:
        x = x.clamp(-number.largest, number.largest)
    return x.to(dtype)


def _tf32(x: Tensor) -> Tensor:
    """fp32 with the last 13 bits of the mantissa rounded away, ties to even; NaN and infinities stay."""
    bits = x.float().view(torch.int32)
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000
    return torch.where(x.isfinite(), rounded.view(torch.float32), x.float())
