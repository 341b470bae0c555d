"""Names of quantisation schemes:

int4-g32-gptq     codes, then what differs from their usual form, in any order

codes             bf16, fp16         rounded, without scales
                  int2 ... int16     integers times a scale
                  fp8_e4m3, fp8_e5m2 8-bit floats times a scale
                  nf4                quantiles of a normal distribution (arXiv 2305.14314); 64 share one
                  nvfp4, mxfp4       4-bit floats; 16 share an e4m3 scale, or 32 a power of two
                  codebook2 ... 4    2^n numbers found for each matrix (k-means), times a scale per row
tensor, row, gN   what shares a scale: a matrix, a row of it (an output), N neighbours in a row
affine            integers from 0, and a zero point for each scale
gptq              GPTQ: each code makes up for the errors of those before it (arXiv 2210.17323)
bias              the mean error of an output is taken from its bias
lrN               the weight's error is added again as a product of rank N, in bf16
a8                inputs in the same 8 bits, a scale for each token
a8s               inputs in the same 8 bits, a scale found on calibration rows: of the smallest squared
                  error (a8s), of the largest value (a8s_minmax), or the 99.9th percentile (a8s_percentile)
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hybridtrain.errors import UserError, refusal

SCALE_BITS = 16
"""Scales are stored in bf16, if the scheme does not say otherwise."""
FACTOR_BITS = 16


@dataclass(frozen=True)
class Scheme:
    """How the weights of linear layers are stored, and in what their inputs are multiplied."""

    name: str
    codes: str
    bits: int
    """Of a code."""
    share: str
    """tensor, row or group; "" for numbers without a scale."""
    group: int = 0  # weights in a row that share a scale
    affine: bool = False
    gptq: bool = False
    bias: bool = False
    rank: int = 0  # of the product that is added
    inputs: str = ""  # "": as they are; token: a scale each; minmax, percentile, mse: one scale, so found

    @property
    def calibrates(self) -> bool:
        """Whether codes or scales follow from inputs of the layers."""
        return self.gptq or self.bias or self.inputs in ("minmax", "percentile", "mse")

    def stored_bits(self, outputs: int, inputs: int) -> int:
        """Of a matrix, with scales and what else is stored beside its codes."""
        count = outputs * inputs
        scales = {"": 0, "tensor": 1, "row": outputs, "group": outputs * -(-inputs // max(1, self.group))}
        each = 8 if self.codes in ("nvfp4", "mxfp4") else SCALE_BITS
        total = count * self.bits + scales[self.share] * (each + self.bits * self.affine)
        total += 32 if self.codes == "nvfp4" else 0
        total += SCALE_BITS * 2**self.bits if self.codes == "codebook" else 0
        total += FACTOR_BITS * self.rank * (outputs + inputs)
        return total + (FACTOR_BITS * outputs if self.bias else 0)


def _int(bits: int) -> Scheme:
    name = f"int{bits}"
    return Scheme(name, "int", bits, "group", 32) if bits <= 4 else Scheme(name, "int", bits, "row")


BASES: Mapping[str, Scheme] = {
    each.name: each
    for each in (
        Scheme("bf16", "bf16", 16, ""),
        Scheme("fp16", "fp16", 16, ""),
        *map(_int, (2, 3, 4, 8, 16)),
        Scheme("fp8_e4m3", "e4m3", 8, "row"),
        Scheme("fp8_e5m2", "e5m2", 8, "row"),
        Scheme("nf4", "nf4", 4, "group", 64),
        Scheme("nvfp4", "nvfp4", 4, "group", 16),
        Scheme("mxfp4", "mxfp4", 4, "group", 32),
        *(Scheme(f"codebook{bits}", "codebook", bits, "row") for bits in (2, 3, 4)),
    )
}
"""Codes -> their usual form."""

_Change = Callable[[re.Match[str]], dict[str, object]]
_CHANGES: tuple[tuple[re.Pattern[str], tuple[str, ...], _Change], ...] = (
    (re.compile("tensor|row"), ("int", "e4m3", "e5m2"), lambda match: {"share": match[0], "group": 0}),
    (re.compile(r"g([1-9]\d{0,5})"), ("int",), lambda match: {"share": "group", "group": int(match[1])}),
    (re.compile("affine"), ("int",), lambda _: {"affine": True}),
    (
        re.compile("gptq"),
        ("int", "e4m3", "e5m2", "nf4", "nvfp4", "mxfp4", "codebook"),
        lambda _: {"gptq": True},
    ),
    (re.compile("bias"), (), lambda _: {"bias": True}),
    (re.compile(r"lr([1-9]\d{0,3})"), (), lambda match: {"rank": int(match[1])}),
    (re.compile("a8"), ("int", "e4m3", "e5m2"), lambda _: {"inputs": "token"}),
    (
        re.compile("a8s(?:_(minmax|percentile))?"),
        ("int", "e4m3", "e5m2"),
        lambda match: {"inputs": match[1] or "mse"},
    ),
)
"""(word, codes that it is for (empty: all with scales), what it changes)."""
WORDS = "tensor, row, gN, affine, gptq, bias, lrN, a8, a8s, a8s_minmax, a8s_percentile"


def parse(text: str, *, field: str) -> Scheme:
    """The scheme of a name. Raises UserError with `field` for another name."""
    base, *words = text.split("-")
    if base not in BASES:
        raise _refused(field, text, f"no codes are named '{base}'", allowed=", ".join(BASES))
    scheme = BASES[base]
    changed: set[str] = set()
    for word in words:
        change = _change(word, scheme, field=field, text=text)
        if twice := changed & change.keys():
            raise _refused(field, text, f"'{word}' sets {min(twice)} again", allowed="each once")
        changed |= change.keys()
        scheme = dataclasses.replace(scheme, **change)  # type: ignore[arg-type]
    if scheme.inputs and scheme.bits != 8:
        raise _refused(field, text, f"inputs of {scheme.bits} bits", allowed="a8 with int8 and fp8")
    return dataclasses.replace(scheme, name=text)


def _change(word: str, scheme: Scheme, *, field: str, text: str) -> dict[str, object]:
    for pattern, codes, change in _CHANGES:
        if (match := pattern.fullmatch(word)) is None:
            continue
        if scheme.share == "" or (codes and scheme.codes not in codes):
            where = ", ".join(name for name, each in BASES.items() if each.codes in codes or not codes)
            raise _refused(field, text, f"{scheme.codes} has no '{word}'", allowed=f"with {where}")
        return change(match)
    raise _refused(field, text, f"no form is named '{word}'", allowed=WORDS)


def check_shape(scheme: Scheme, *, outputs: int, inputs: int, path: str, field: str) -> None:
    """Refuse a matrix whose rows are not whole groups, or too small for a product (raises UserError)."""
    if scheme.share == "group" and inputs % scheme.group:
        words = f"{path} has rows of {inputs} weights, which are not whole groups of {scheme.group}"
        sizes = [size for size in (16, 32, 64, 128) if inputs % size == 0]
        fits = f"groups of {', '.join(map(str, sizes))}" if sizes and scheme.codes == "int" else "row, tensor"
        raise _refused(field, scheme.name, words, allowed=fits)
    if scheme.rank > min(outputs, inputs):
        words = f"{path} is {outputs} x {inputs}"
        raise _refused(field, scheme.name, words, allowed=f"lrN up to {min(outputs, inputs)}")


def _refused(field: str, text: str, problem: str, *, allowed: str) -> UserError:
    return refusal(field, text, problem, allowed=allowed, instead=f"{field}=int4-g32-gptq")
