"""Adds fp32 changes to bf16 weights: with compensation, or rounded stochastically.

Rounded to nearest, a change of less than half a step of bf16, 2^-9 of the weight, is lost: with a learning
rate of 1e-4 that was 60 % of each update.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_STEP = 0x9E3779B1 - (1 << 32)
"""The golden ratio times 2^32, odd, as an int32."""


def add_compensated(weight: Tensor, change: Tensor, compensation: Tensor) -> tuple[Tensor, Tensor]:
    """Kahan's sum: (weight, compensation) in bf16 after `change` (fp32).

    The compensation is what the weight lacks; with it a weight has 16 bits.
    """
    due = compensation.float() + change
    new = (weight.float() + due).to(weight.dtype)
    return new, (due - (new.float() - weight.float())).to(compensation.dtype)


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
