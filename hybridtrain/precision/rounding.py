"""Rounding of bf16 weights: with the 16 bits that are cut off kept beside them, or stochastically.

Rounded to nearest, a change of less than half a step of bf16, 2^-9 of the weight, is lost: at a learning rate
of 1e-4 that was 60 % of each update.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_STEP = 0x9E3779B1 - (1 << 32)
"""The golden ratio times 2^32, odd, as an int32."""


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 values as (the nearest bf16, what it lacks: int16, in units of the last bit of fp32).

    Kahan's compensation, exactly: a bf16 number for it would keep 8 of the 16 bits, so that of equal
    updates of 1e-5 of a weight an eighth is lost or added.
    """
    bits = values.view(torch.int32)
    high = (bits + (1 << 15)) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def joined(weight: Tensor, compensation: Tensor) -> Tensor:
    """The fp32 values of `split`."""
    return ((weight.view(torch.int16).int() << 16) + compensation).view(torch.float32)


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """fp32 values as bf16, up or down with probabilities that make them right on average.

    `bits`: int32, uniform in 0 to 2^16 - 1. Infinities stay, NaN stay NaN.
    """
    rounded = ((values.view(torch.int32) + bits) & -(1 << 16)).view(torch.float32)
    return torch.where(torch.isfinite(values), rounded, values).bfloat16()


def key_of(*, seed: int, name: str) -> int:
    """The key of a parameter's random bits, an int32."""
    digest = hashlib.sha256(f"rounding:{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:4], "big", signed=True)


def random_bits(index: Tensor, *, key: int, step: Tensor) -> Tensor:
    """16 random bits for each element, the same under every layout, on every replica and after a resume.

    `index`: int32, modulo 2^32; `step`: 0-d. Two rounds of MurmurHash3's finalizer.
    """
    stream = _mixed(step.to(torch.int32) * _STEP + key)
    return (_mixed(index * _STEP + stream) >> 8) & 0xFFFF


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 16)) * (0x85EBCA6B - (1 << 32))
    x = (x ^ _shifted(x, 13)) * (0xC2B2AE35 - (1 << 32))
    return x ^ _shifted(x, 16)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right of int32."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)
