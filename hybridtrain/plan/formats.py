"""Number formats, and the formats in which linear layers multiply: data without torch.

A product of a linear layer has three operands, each rounded to a number format of its own:

    x  input               forward  y  = x w^T
    w  weight              backward dx = g w
    g  output's gradient            dw = g^T x

A scaled operand is multiplied by a number that brings its largest value to the largest of the format, and the
product is divided by it. `scale` says how many values share one: "tensor"; "row", all that are added up
for one element of the product; "block", 32 of those; "" for none.

In quantisation-aware training (QAT) only weights are rounded, to what `hybridtrain quantize` stores, and only
in products: gradients pass as if they were not (arXiv 1712.05877; straight through, arXiv 1308.3432).

FP8: arXiv 2209.05433 (e4m3 has no infinity; its largest value is 448). Blocks with power-of-two scales: OCP
Microscaling Formats (MX) v1.0.
"""

from __future__ import annotations

from dataclasses import dataclass

BLOCK = 32
"""Values that share a scale in the formats with blocks, as the MX specification has it."""


@dataclass(frozen=True)
class Number:
    """A number format: sign, `exponent_bits` and `mantissa_bits`; an integer format has no exponent bits."""

    name: str
    dtype: str
    """torch's name."""
    exponent_bits: int
    mantissa_bits: int
    largest: float

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def smallest_normal(self) -> float:
        """The smallest value with all mantissa bits."""
        return 2.0 ** (2 - 2 ** (self.exponent_bits - 1)) if self.exponent_bits else 1.0

    @property
    def smallest_subnormal(self) -> float:
        """The smallest value above 0."""
        return self.smallest_normal * 2.0**-self.mantissa_bits if self.exponent_bits else 1.0

    @property
    def epsilon(self) -> float:
        """Distance from 1 to the next larger value."""
        return 2.0**-self.mantissa_bits if self.exponent_bits else 1.0


FP64 = Number("fp64", "float64", 11, 52, 2.0**1023 * (2 - 2.0**-52))
FP32 = Number("fp32", "float32", 8, 23, 2.0**127 * (2 - 2.0**-23))
TF32 = Number("tf32", "float32", 8, 10, 2.0**127 * (2 - 2.0**-10))
BF16 = Number("bf16", "bfloat16", 8, 7, 2.0**127 * (2 - 2.0**-7))
FP16 = Number("fp16", "float16", 5, 10, 65504.0)
E4M3 = Number("e4m3", "float8_e4m3fn", 4, 3, 448.0)
E5M2 = Number("e5m2", "float8_e5m2", 5, 2, 57344.0)
INT8 = Number("int8", "int8", 0, 7, 127.0)
INT4 = Number("int4", "int8", 0, 3, 7.0)
NUMBERS = {each.name: each for each in (FP64, FP32, TF32, BF16, FP16, E4M3, E5M2, INT8, INT4)}


@dataclass(frozen=True)
class Format:
    """How a linear layer multiplies."""

    name: str
    x: Number | None
    """None: in the dtype that the layer is given, as `g` then is."""
    w: Number
    g: Number | None
    scale: str
    """tensor, row, block or "" (above)."""
    exact_scale: bool
    """Whether scales are powers of two, so that scaling rounds nothing."""
    scheme: str
    """Of `hybridtrain quantize`, which stores weights as they are multiplied by; "" without QAT."""

    @property
    def order(self) -> tuple[int, int]:
        """(bits, exponent bits) of the weight: a wider format has the larger pair."""
        return self.w.bits, self.w.exponent_bits


def _plain(number: Number) -> Format:
    return Format(number.name, number, number, number, "", exact_scale=True, scheme="")


FORMATS = {
    each.name: each
    for each in (
        Format("fp8_tensorwise", E4M3, E4M3, E5M2, "tensor", exact_scale=True, scheme=""),
        Format("fp8_rowwise", E4M3, E4M3, E4M3, "row", exact_scale=True, scheme=""),
        Format("mxfp8", E4M3, E4M3, E4M3, "block", exact_scale=True, scheme=""),
        Format("int8", INT8, INT8, INT8, "row", exact_scale=False, scheme=""),
        Format("qat_int8", None, INT8, None, "row", exact_scale=False, scheme="int8"),
        Format("qat_int4", None, INT4, None, "block", exact_scale=False, scheme="int4-g32"),
        *map(_plain, (FP16, BF16, TF32, FP32, FP64)),
    )
}
"""precision.compute -> format; those without a scale are the number format itself."""

SCHEMES = {each.name: each.scheme for each in FORMATS.values() if each.scheme}
"""Formats of quantisation-aware training -> their schemes."""

HIGH = "high"
"""In precision.rules: the format of precision.kind, as all other modules."""
CARRIERS = {
    "fp64": "fp64",
    "fp32": "fp32",
    "tf32": "fp32",
    "bf16_mixed": "bf16",
    "bf16_pure": "bf16",
    "fp16_mixed": "fp16",
}
"""precision.kind -> the format of everything that linear layers exchange."""


def is_wider(name: str, than: str) -> bool:
    """Whether a format holds numbers that another does not."""
    return FORMATS[name].order > FORMATS[than].order
