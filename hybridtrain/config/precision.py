"""The `precision` section; the other sections of training are in sections.py."""

from __future__ import annotations

from hybridtrain.config.sections import Options, options

PRECISIONS = ("fp32", "bf16_mixed", "bf16_pure", "fp16_mixed")


@options
class PrecisionConfig(Options):
    kind: str = "fp32"
    """fp32, bf16_mixed, bf16_pure or fp16_mixed. bf16_pure has no fp32 master weights: updates smaller than
    2^-9 of a weight are lost."""
    init_scale: float = 65536.0
    """fp16_mixed: initial loss scale. Until a first step is finite, each step lowers it, above 2^16 to its
    square root: 2^100, 2^50, 2^25, 2^16."""
    static_scale: float | None = None
    """fp16_mixed: a loss scale that never changes; null: a dynamic one, by the other options."""
    growth_factor: float = 2.0
    """fp16_mixed: factor on the loss scale after growth_interval finite steps in a row."""
    backoff_factor: float = 0.5
    """fp16_mixed: factor on the loss scale after steps with a non-finite gradient, see hysteresis."""
    growth_interval: int = 2000
    """fp16_mixed: finite steps in a row before the scale grows."""
    min_scale: float = 1.0
    """fp16_mixed: smallest loss scale."""
    hysteresis: int = 2
    """fp16_mixed: the loss scale falls at this many steps with a non-finite gradient since it last grew, and
    at each further one. With 2, a single bad batch is skipped and costs no scale."""
