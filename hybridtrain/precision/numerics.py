"""What the numerics monitor has found in a step, and its line in numerics.jsonl. No torch.

roles of a module    x  its input     w  its weight     g  the gradient of its output     y  its output
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybridtrain.config.schema import PrecisionConfig
from hybridtrain.plan.formats import FORMATS, NUMBERS
from hybridtrain.precision.histogram import BINS, NON_FINITE, Shares, shares, tensorwise_scale
from hybridtrain.precision.rules import has_loss_scale
from hybridtrain.runtime.files import finite

ROLES = ("x", "w", "g", "y")
SNR_BINS = 96
"""Bins of 1 dB, from 0 dB on, for the signal-to-noise ratios of channels."""
_FP8 = {"x": "e4m3", "w": "e4m3", "g": "e5m2", "y": "e4m3"}
_FP16 = dict.fromkeys(ROLES, "fp16")
_SCALED = ("e4m3", "e5m2", "int8", "int4")


def formats_of(precision: PrecisionConfig) -> Mapping[str, str]:
    """Role -> the number format in which a recipe's operands are judged: that in which linear layers multiply
    if it has scales; fp16 where that is used; else fp8, the next narrower one (in fp32 and bf16 nothing
    underflows). Weights in quantisation-aware training as if a tensor had one scale, which is an upper bound.
    """
    chosen, others = FORMATS.get(precision.compute), _FP16 if has_loss_scale(precision) else _FP8
    if chosen is None or not chosen.scale:
        return others
    if chosen.x is None or chosen.g is None:
        return {**others, "w": chosen.w.name}
    return {"x": chosen.x.name, "w": chosen.w.name, "g": chosen.g.name, "y": chosen.x.name}


@dataclass(frozen=True)
class Statistics:
    """Of one operand of a module in one step, over all micro-batches and ranks."""

    histogram: tuple[int, ...]
    """Exponents of all numbers as they are in the step: gradients times the loss scale; (256,), or empty for
    role y, of which only the largest magnitude is known."""
    amax: float
    """Largest magnitude, infinite if a number is not finite; of gradients without the loss scale."""
    rms: float | None
    """Root mean square, without the loss scale; None for role y, and if a number is not finite."""
    snr: float | None
    """Signal-to-noise ratio in dB that a channel keeps in the role's format, the median over channels; None
    where the role has no channels."""

    @property
    def non_finite(self) -> int:
        """Infinities and NaN; of role y 1 if there are any."""
        return self.histogram[NON_FINITE] if self.histogram else int(not math.isfinite(self.amax))

    def shares(self, name: str) -> Shares:
        """Shares that a format loses: fp8 with the scale that fits the largest number, others without."""
        form = NUMBERS[name]
        scale = tensorwise_scale(self.histogram, form) if name in _SCALED and self.histogram else 0
        return shares(self.histogram, form, scale=scale)


@dataclass(frozen=True)
class Update:
    """Of one parameter in one step. None where no update was made, and what does not apply."""

    grad_norm: float | None
    """L2 norm, without the loss scale, before clipping."""
    ratio: float | None
    """Norm of the update by the norm of the weights before it."""
    realised: float | None
    """bf16 weights under AdamW: the share of the update that rounding has left; 1 is all."""
    lost: float | None
    """bf16 weights under AdamW: the share of weights that rounding has left unchanged."""


@dataclass(frozen=True)
class Sample:
    """All figures of a sampled step; the same on every rank."""

    step: int
    """Optimizer steps done, including this one."""
    loss_scale: float
    skipped: bool
    formats: Mapping[str, str]
    """Role -> format of `snr`."""
    modules: Mapping[str, Mapping[str, Statistics]]
    """Module -> role -> statistics."""
    parameters: Mapping[str, Update]

    def aggregates(self) -> dict[str, float]:
        """A few numbers for trackers: the worst of all modules and roles."""
        found = [
            each.shares(self.formats[role])
            for roles in self.modules.values()
            for role, each in roles.items()
            if each.histogram
        ]
        lost = [update.lost for update in self.parameters.values() if update.lost is not None]
        return {
            "numerics/worst_underflow": max((each.underflow for each in found), default=0.0),
            "numerics/worst_overflow": max((each.overflow for each in found), default=0.0),
            "numerics/non_finite": float(
                sum(each.non_finite for roles in self.modules.values() for each in roles.values())
            ),
            **({"numerics/worst_lost_updates": max(lost)} if lost else {}),
        }

    def line(self) -> dict[str, Any]:
        """The line of numerics.jsonl."""
        return finite(
            {
                "step": self.step,
                "loss_scale": self.loss_scale,
                "skipped": int(self.skipped),
                "formats": dict(self.formats),
                "modules": {
                    name: {role: _packed(each) for role, each in roles.items()}
                    for name, roles in self.modules.items()
                },
                "parameters": {
                    name: {key: _short(value) for key, value in vars(update).items() if value is not None}
                    for name, update in self.parameters.items()
                },
            }
        )


def sample_of(line: Mapping[str, Any]) -> Sample:
    """The sample of a line of numerics.jsonl. Raises ValueError, KeyError or TypeError for a damaged one."""
    modules = {
        str(name): {role: _unpacked(each) for role, each in roles.items() if role in ROLES}
        for name, roles in line["modules"].items()
    }
    parameters = {
        str(name): Update(*(_number(values.get(key)) for key in ("grad_norm", "ratio", "realised", "lost")))
        for name, values in line["parameters"].items()
    }
    formats = {role: str(line["formats"][role]) for role in ROLES}
    if not set(formats.values()) <= NUMBERS.keys():
        raise ValueError(f"unknown formats {formats}")
    if not isinstance(line["step"], int):
        raise TypeError("the step is no integer")
    return Sample(
        line["step"], float(line["loss_scale"]), bool(line["skipped"]), formats, modules, parameters
    )


def median_snr(counts: Sequence[float]) -> float | None:
    """The median of channels counted in SNR_BINS bins of 1 dB, as if evenly spread in a bin; None without."""
    half, below = sum(counts) / 2, 0.0
    if not half:
        return None
    for decibel, count in enumerate(counts):
        if below + count >= half and count:
            return decibel + (half - below) / count
        below += count
    raise AssertionError("the counts exceed their sum")


def _packed(each: Statistics) -> dict[str, Any]:
    pairs = [[index, count] for index, count in enumerate(each.histogram) if count]
    figures = {"amax": _short(each.amax), "rms": _short(each.rms), "snr": _short(each.snr)}
    return {key: value for key, value in figures.items() if value is not None} | (
        {"histogram": pairs} if each.histogram else {}
    )


def _unpacked(values: Mapping[str, Any]) -> Statistics:
    amax = _number(values["amax"])
    histogram = tuple(_spread(values["histogram"])) if "histogram" in values else ()
    return Statistics(
        histogram, math.inf if amax is None else amax, _number(values.get("rms")), _number(values.get("snr"))
    )


def _spread(pairs: Sequence[Sequence[int]]) -> Iterator[int]:
    counts = dict.fromkeys(range(BINS), 0)
    for index, count in pairs:
        if not (isinstance(count, int) and count > 0 and counts[index] == 0):
            raise ValueError(f"not a bin and its count: {index}, {count}")
        counts[index] = count
    return iter(counts.values())


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _short(value: float | None) -> float | None:
    """Six digits, which is what fp32 sums are good for."""
    return None if value is None else float(f"{value:.6g}")
