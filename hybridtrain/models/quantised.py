"""QLoRA: frozen weights of the linear layers that have adapters, stored in 4 or 8 bits (arXiv 2305.14314).

    adapters.base_format   a weight (N, K) is stored as       of
    nf4                    codes, uint8 (N, K / 2)            16 values, at quantiles of a normal distribution
                           largest values (N, K / BLOCK)      BLOCK neighbours in a row
    int8                   codes, int8 (N, K)                 -127 to 127
                           largest values (N, 1)              a row

A value is what its code stands for, times the largest magnitude of its block or row, which is stored in the
dtype that computes. The codes keep the name of the weight. They follow from whole rows of the pretrained
weights, so that they are the same under every layout. Forward and backward pass each compute the weight anew,
and keep none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hybridtrain.config.schema import AdaptersConfig
from hybridtrain.errors import refusal
from hybridtrain.models.init import Slices, WeightSource
from hybridtrain.models.linears import Linear
from hybridtrain.types import Quantised

FIELD = "adapters.base_format"
LARGEST = "weight_absmax"
BLOCK = 64
"""Values that share a largest magnitude in nf4."""
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""What the codes of nf4 stand for."""


class QuantisedLinear(nn.Linear):
    """nn.Linear with a frozen weight in codes. Made by `convert`."""

    product = None  # it multiplies in the dtype of its input (precision/qlinear.py)
    weight_absmax: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self.weight, self.weight_absmax, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, largest: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, largest)
        return nn.functional.linear(x, values(codes, largest), bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return g @ values(*ctx.saved_tensors), None, None, None


def values(codes: Tensor, largest: Tensor) -> Tensor:
    """The weight that codes stand for, in the dtype of the largest values."""
    wide = largest.to(torch.promote_types(largest.dtype, torch.float32))
    if codes.dtype == torch.int8:
        return (codes.to(wide.dtype) * (wide / 127)).to(largest.dtype)
    pairs = torch.stack((codes >> 4, codes & 15), dim=-1).flatten(-2)
    levels = torch.tensor(NF4_LEVELS, dtype=wide.dtype, device=codes.device)[pairs.int()]
    blocks = levels.unflatten(-1, (-1, BLOCK)) * wide.unsqueeze(-1)
    return blocks.flatten(-2).to(largest.dtype)


def weight_of(module: Any) -> Tensor:
    """The weight of a linear layer, which may store codes."""
    largest = module._parameters.get(LARGEST)
    return module.weight if largest is None else values(module.weight, largest)


def quantise(weight: Tensor, kind: str, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(codes, largest values in `dtype`) of whole rows of a weight."""
    rows = weight.float()
    blocks = rows.unflatten(-1, (-1, BLOCK if kind == "nf4" else rows.shape[-1]))
    largest = blocks.abs().amax(-1).to(dtype)
    unit = (blocks / largest.float().clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)).flatten(-2)
    if kind == "int8":
        return (unit * 127).round().clamp(-127, 127).to(torch.int8), largest
    levels = torch.tensor(NF4_LEVELS, device=rows.device)
    codes = torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)
    return codes[..., ::2] << 4 | codes[..., 1::2], largest


def convert(module: Any, kind: str) -> None:
    """Let a linear layer store codes, in place: their values are those of `stored`."""
    weight: Tensor = module.weight.detach()
    rows, inputs = weight.shape
    nf4 = kind == "nf4"
    codes = weight.new_empty(rows, inputs // 2 if nf4 else inputs, dtype=torch.uint8 if nf4 else torch.int8)
    largest = weight.new_empty(rows, inputs // BLOCK if nf4 else 1)
    module.__class__ = QuantisedLinear
    module.weight = nn.Parameter(codes, requires_grad=False)
    module.register_parameter(LARGEST, nn.Parameter(largest, requires_grad=False))


def names(linears: Iterable[Linear]) -> set[str]:
    """Names of the parameters that hold largest values."""
    return {f"{linear.path}.{LARGEST}" for linear in linears}


def stored(base: WeightSource, linears: Sequence[Linear], kind: str, *, dtype: torch.dtype) -> WeightSource:
    """The weights of a model in which `linears` store codes, from its plain ones."""
    inputs = {linear.path: linear.inputs for linear in linears}

    def part(name: str, shape: tuple[int, ...], slices: Slices) -> Tensor:
        path, _, key = name.rpartition(".")
        if path not in inputs or key not in ("weight", LARGEST):
            return base(name, shape, slices)
        whole = (shape[0], inputs[path])
        rows = base(f"{path}.weight", whole, (slices[0], slice(0, inputs[path])))
        return quantise(rows, kind, dtype=dtype)[key == LARGEST][:, slices[1]]

    return part


def plain(base: WeightSource, linears: Sequence[Linear], kind: str, *, dtype: torch.dtype) -> WeightSource:
    """The weights of a plain model, with those of `linears` as their codes have them."""
    weights = {f"{linear.path}.weight" for linear in linears}

    def part(name: str, shape: tuple[int, ...], slices: Slices) -> Tensor:
        if name not in weights:
            return base(name, shape, slices)
        rows = base(name, shape, (slices[0], slice(0, shape[1])))
        return values(*quantise(rows, kind, dtype=dtype))[:, slices[1]]

    return part


def tensors(
    base: WeightSource, linears: Iterable[Linear], kind: str, *, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Name -> whole codes and largest values of the weights of `linears`."""
    found: dict[str, Tensor] = {}
    for linear in linears:
        name, shape = f"{linear.path}.weight", (linear.outputs, linear.inputs)
        codes, largest = quantise(base(name, shape, tuple(map(slice, shape))), kind, dtype=dtype)
        found |= {name: codes, f"{linear.path}.{LARGEST}": largest}
    return found


def sizes(linears: Iterable[Linear], kind: str) -> Quantised:
    """What linear layers store."""
    found = Quantised(0, 0, 0)
    for linear in linears:
        count = linear.inputs * linear.outputs
        codes, largest = (count // 2, count // BLOCK) if kind == "nf4" else (count, linear.outputs)
        found = Quantised(found.weights + count, found.codes + codes, found.largest + largest)
    return found


def check(linears: Sequence[Linear], settings: AdaptersConfig, *, transposed: bool) -> None:
    """Refuse weights that cannot be stored in the format (raises UserError)."""
    kind, others = settings.base_format, "none, int8"
    if transposed:
        words = "the model stores weights transposed, as GPT-2, so that their rows are no layer's outputs"
        raise refusal(FIELD, kind, words, allowed="none for this model", instead=f"{FIELD}=none")
    for linear in linears:
        if kind == "nf4" and linear.inputs % BLOCK:
            words = (
                f"{linear.path} has rows of {linear.inputs} weights, which are not whole blocks of {BLOCK}"
            )
            raise refusal(FIELD, kind, words, allowed=others, instead=f"{FIELD}=int8")
