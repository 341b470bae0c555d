"""The `precision` section; most sections of training are in sections.py."""

from __future__ import annotations

from dataclasses import field

from hybridtrain.config.options import Options, options

PRECISIONS = ("fp32", "fp64", "tf32", "bf16_mixed", "bf16_pure", "fp16_mixed")
STATES = ("auto", "fp32", "bf16", "8bit")
ROUNDINGS = ("kahan", "stochastic", "nearest")


@options
class PrecisionConfig(Options):
    kind: str = "fp32"
    """Formats of master weights, computation and reductions: fp32, fp64, tf32 (fp32, whose products round
    their operands to 10 bits), bf16_mixed, fp16_mixed, or bf16_pure, which has no fp32 master weights,
    see `rounding`."""
    compute: str = ""
    """Format in which linear layers inside the layers multiply: fp8_tensorwise, fp8_rowwise, mxfp8, int8,
    fp16, bf16, tf32, fp32; empty: that of `kind`. qat_int8, qat_int4: in that of `kind`, with weights rounded
    as `hybridtrain quantize` stores them (docs/precision.md)."""
    rules: list[dict[str, str]] = field(default_factory=list)
    """Exceptions, e.g. [{match: "*.down_proj", compute: bf16}]: shell-style patterns of paths of linear
    layers, each with a format as in `compute`, or high, that of `kind`. The first that matches counts."""
    high_first: int = 0
    """Number of first layers whose linear layers stay high, unless a rule names them."""
    high_last: int = 0
    """The same for the last layers."""
    adaptive: bool = False
    """Let each linear layer climb `ladder` where its numbers do not fit its format, and come down where they
    would again. Decided on the samples of monitor_every; the first 8 steps are all sampled."""
    ladder: list[str] = field(default_factory=list)
    """adaptive: formats from the lowest, which is `compute`, to the highest, e.g. [fp8_tensorwise, bf16]."""
    adaptive_patience: int = 2
    """adaptive: samples in a row in which a layer's format does not fit, before it is promoted."""
    adaptive_budget: float = 1.0
    """adaptive: largest share of the linear layers' parameters that may leave the lowest format."""
    emulate: bool = False
    """Compute formats that the device does not have with rounded operands, slowly. On a CPU, formats of 8
    bits are emulated always."""
    state: str = "auto"
    """Format of Adam's two moments: fp32, bf16, 8bit (a byte each, and a scale per 128 elements of a row;
    vectors, small matrices and short rows stay in fp32), or auto: that of the master weights."""
    rounding: str = "kahan"
    """bf16_pure: how adamw rounds weights. kahan: 16 bits beside each keep what rounding cuts off;
    stochastic: up or down at random, right on average, without more memory; nearest: updates smaller than
    2^-9 of a weight are lost. A registered optimizer rounds as it does."""
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
    monitor_every: int = 0
    """Steps between samples of the numerics monitor, besides the first step: exponent histograms of what each
    module computes, and figures of each update, into numerics.jsonl (docs/run-directory.md); 0: never."""
    monitor_modules: list[str] = field(default_factory=lambda: ["*"])
    """Shell-style patterns of the modules that the numerics monitor watches, of those with parameters, e.g.
    '*.mlp.*'."""
