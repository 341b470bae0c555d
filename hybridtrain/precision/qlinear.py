"""Linear layers that multiply in a format of plan/formats.py: `QLinear` and `product`.

Without a GPU that has the format, its numbers are emulated exactly: operands are rounded to the format, and
multiplied in the dtype that the layer's input has, fp16 in fp32. Scales that are powers of two round nothing;
where they do (int8), codes are multiplied in fp32.

In quantisation-aware training the weight alone is rounded, to what its codes stand for in the dtype of the
input, and in the backward pass anew, so that no copy of it is kept.

Under tensor parallelism a layer sees this rank's part of its operands; a scale is that of the whole: the
largest value is found over the ranks that share it.

M rows (tokens), K inputs, N outputs; o, k: the two dimensions of any operand, k the one that is added up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybridtrain.plan.formats import BLOCK, Format, Number
from hybridtrain.precision import integers
from hybridtrain.precision.round import round_to
from hybridtrain.runtime.collectives import Ranks

_SMALLEST_AMAX = 1e-30
"""A row of zeros has a scale too; smaller values become 0."""


@dataclass(frozen=True)
class Product:
    """How a layer multiplies."""

    format: Format
    cut: str
    """Of the weight (N, K), under tensor parallelism: "N", "K", or "" for a layer that is whole."""
    ranks: Ranks | None
    """Those that share a layer that is cut."""
    native: bool
    """Whether torch's fp8 kernel multiplies; else the format is emulated."""


class QLinear(nn.Linear):
    """nn.Linear in a format; `product` None: as nn.Linear. Made by `convert`."""

    product: Product | None

    def forward(self, x: Tensor) -> Tensor:
        if self.product is None:
            return nn.functional.linear(x, self.weight, self.bias)
        y = product(x, self.weight, self.product)
        return y if self.bias is None else y + self.bias


class QConv1D(nn.Module):
    """transformers' Conv1D, a linear layer whose weight is (K, N), in a format. Made by `convert`."""

    transposed = True
    weight: nn.Parameter
    bias: nn.Parameter
    product: Product | None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.t()
        if self.product is None:
            return nn.functional.linear(x, weight, self.bias)
        return product(x, weight, self.product) + self.bias


def convert(module: Any, how: Product | None) -> None:
    """Make a linear layer multiply in a format, in place: its class changes, parameters and hooks stay."""
    module.__class__ = QLinear if isinstance(module, nn.Linear) else QConv1D
    module.product = how


def product(x: Tensor, weight: Tensor, how: Product) -> Tensor:
    """x (..., K) times weight (N, K), both rounded to the format: (..., N), in the dtype of x."""
    kind = _StraightThrough if how.format.scheme else _Product
    return kind.apply(x.reshape(-1, x.shape[-1]), weight, how).view(*x.shape[:-1], weight.shape[0])


class _StraightThrough(torch.autograd.Function):
    """The product with a rounded weight, whose gradient is that of a weight that is not."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, w_NK: Tensor, how: Product) -> Tensor:
        scale = weight_scale(w_NK, how)
        ctx.save_for_backward(x_MK, w_NK, scale)
        ctx.largest = how.format.w.largest
        return x_MK @ integers.rounded(w_NK, scale, ctx.largest).to(x_MK.dtype).t()

    @staticmethod
    def backward(ctx: Any, g_MN: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x_MK, w_NK, scale = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = g_MN @ integers.rounded(w_NK, scale, ctx.largest).to(g_MN.dtype)
        if ctx.needs_input_grad[1]:
            dw = g_MN.t() @ x_MK
        return dx, dw, None


def weight_scale(w_NK: Tensor, how: Product) -> Tensor:
    """The scales of this rank's part of a weight that is rounded in training, fp32 (N, groups in a row)."""
    groups = w_NK.float().unflatten(-1, (-1, BLOCK if how.format.scale == "block" else w_NK.shape[1]))
    amax = groups.abs().amax(-1)
    if how.cut == "K" and how.ranks is not None and how.format.scale == "row":
        amax = how.ranks.max(_nan_as_inf(amax))
    return integers.scale_of(amax, how.format.w.largest)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, w_NK: Tensor, how: Product) -> Tensor:
        shared = how.ranks if how.cut == "K" else None
        x = _scaled("x", x_MK, how, added=shared, scale=None)
        w = _scaled("w", w_NK, how, added=shared, scale=None)
        one = how.format.scale == "tensor"  # the same scale in the backward pass
        ctx.save_for_backward(x_MK, w_NK, x.scale if one else None, w.scale if one else None)
        ctx.how = how
        return _multiply(x, w, how, dtype=x_MK.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, g_MN: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (x_MK, w_NK, x_scale, w_scale), how, dtype = ctx.saved_tensors, ctx.how, g_MN.dtype
        dx = dw = g_scale = None
        if ctx.needs_input_grad[0]:
            shared = how.ranks if how.cut == "N" else None
            g = _scaled("g", g_MN, how, added=shared, scale=None)
            w = _scaled("w", w_NK.t(), how, added=shared, scale=w_scale)
            dx = _multiply(g, w, how, dtype=dtype, fast=False)
            g_scale = g.scale if how.format.scale == "tensor" else None
        if ctx.needs_input_grad[1]:
            g = _scaled("g", g_MN.t(), how, added=None, scale=g_scale)
            x = _scaled("x", x_MK.t(), how, added=None, scale=x_scale)
            dw = _multiply(g, x, how, dtype=dtype, fast=False)
        return dx, dw, None


@dataclass(frozen=True)
class _Scaled:
    """An operand (o, k) = codes / scale."""

    codes: Tensor
    """In the format's dtype."""
    scale: Tensor | None
    """fp32, 0-d, (o, 1) or (o, k / BLOCK, 1)."""


def _scaled(
    role: str, operand: Tensor, how: Product, *, added: Ranks | None, scale: Tensor | None
) -> _Scaled:
    """Round an operand (o, k). `added`: the ranks that share the dimension k; `scale`: its scale, where that
    is known.
    """
    number: Number | None = getattr(how.format, role)
    assert number is not None
    kind = how.format.scale
    if not kind:
        return _Scaled(round_to(operand, number), None)
    if scale is not None:
        return _Scaled(round_to(operand.float() * scale, number), scale)
    if kind == "tensor":
        whole = how.cut and (role, how.cut) not in (("x", "N"), ("g", "K"))
        amax, ranks = operand.abs().amax(), how.ranks if whole else None
    elif kind == "row":
        amax, ranks = operand.abs().amax(-1, keepdim=True), added
    else:
        operand = _blocks(operand)
        amax, ranks = operand.abs().amax(-1, keepdim=True), None
    amax = amax.float() if ranks is None else ranks.max(_nan_as_inf(amax.float()))
    scale = number.largest / amax.clamp(min=_SMALLEST_AMAX)
    if how.format.exact_scale:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    return _Scaled(round_to(operand.float() * scale, number), scale)


def _nan_as_inf(x: Tensor) -> Tensor:
    """A maximum over ranks leaves out NaN; the scale of an infinite value gives nothing finite, either."""
    return torch.where(x.isnan(), torch.inf, x)


def _blocks(operand: Tensor) -> Tensor:
    """(o, k) in blocks: (o, k / BLOCK, BLOCK); the last is filled up with zeros."""
    rest = -operand.shape[-1] % BLOCK
    return nn.functional.pad(operand, (0, rest)).unflatten(-1, (-1, BLOCK))


def _multiply(left: _Scaled, right: _Scaled, how: Product, *, dtype: torch.dtype, fast: bool) -> Tensor:
    """The product (o, p) of two operands (o, k), (p, k), in `dtype`. `fast`: a GPU may add up in less than
    fp32, which is exact enough for activations, not for gradients.
    """
    if left.scale is None or right.scale is None:
        return (left.codes @ right.codes.t()).to(dtype)
    if how.native:
        return _fp8(left, right, dtype, fast=fast)
    if how.format.exact_scale:
        wide = torch.promote_types(dtype, torch.bfloat16)  # fp16 does not have all values of the formats
        return (_values(left, wide) @ _values(right, wide).t()).to(dtype)
    codes = left.codes.float() @ right.codes.float().t()
    return (codes / left.scale / right.scale.view(1, -1)).to(dtype)


def _fp8(left: _Scaled, right: _Scaled, dtype: torch.dtype, *, fast: bool) -> Tensor:
    """By torch's kernel, which takes a row-major and a column-major operand, and divides by the scales."""
    assert left.scale is not None
    assert right.scale is not None
    a, b = left.codes.contiguous(), right.codes.contiguous().t()
    divisor_a, divisor_b = left.scale.reciprocal(), right.scale.reciprocal()
    divisor_b = divisor_b.t().contiguous() if divisor_b.dim() else divisor_b
    return torch._scaled_mm(a, b, divisor_a, divisor_b, out_dtype=dtype, use_fast_accum=fast)


def _values(scaled: _Scaled, dtype: torch.dtype) -> Tensor:
    """The rounded operand (o, k), in `dtype`."""
    assert scaled.scale is not None
    values = (scaled.codes.float() / scaled.scale).to(dtype)
    return values.flatten(1) if values.dim() == 3 else values
