"""The `precision` section; the other sections of training are in sections.py."""

from __future__ import annotations

from hybridtrain.config.sections import Options, options

PRECISIONS = ("fp32", "bf16_mixed", "bf16_pure", "fp16_mixed")
STATES = ("auto", "fp32", "bf16", "8bit")
ROUNDINGS = ("kahan", "stochastic", "nearest")


@options
class PrecisionConfig(Options):
    kind: str = "fp32"
    """fp32, bf16_mixed, bf16_pure or fp16_mixed. bf16_pure has no fp32 master weights, see `rounding`."""
    state: str = "auto"
    """Format of Adam's two moments: fp32, bf16, 8bit (a byte each, and a scale per 128 elements of a row;
    vectors, small matrices and short rows stay in fp32), or auto: that of the master weights."""
    rounding: str = "kahan"
    """bf16_pure: how adamw rounds weights. kahan: 16 bits beside each keep what rounding cuts off;
    stochastic: up or down at random, right on average, without more memory; nearest: updates smaller than
    2^-9 of a weight are lost. A registered optimizer rounds as it does."""
    init_scale: float = 65536.0
    """fp16_mixed: initial loss scale."""
    growth_factor: float = 2.0
    """fp16_mixed: factor on the loss scale after growth_interval finite steps in a row."""
    backoff_factor: float = 0.5
    """fp16_mixed: factor on the loss scale after a step with a non-finite gradient."""
    growth_interval: int = 2000
    """fp16_mixed: finite steps in a row before the scale grows."""
    min_scale: float = 1.0
    """fp16_mixed: smallest loss scale."""
