"""Products in a format: against torch's own fp8 kernel, against whole numbers, and what rounding may not
hide.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hybridtrain.analysis.probe import ThreadRanks
from hybridtrain.plan.formats import E4M3, E5M2, FORMATS, FP16, INT8, NUMBERS, TF32
from hybridtrain.precision.qlinear import Product, convert, product
from hybridtrain.precision.round import dtype_of, round_to

WIDE = torch.tensor([1.0, 30.0, 1e-3, 5.0]).repeat(16)  # columns of unequal size


def operands(rows: int = 32, inputs: int = 32, outputs: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator) * WIDE[:inputs]
    return x.requires_grad_(), torch.randn(outputs, inputs, generator=generator).requires_grad_()


def gradients(
    name: str, x: torch.Tensor, w: torch.Tensor, g: torch.Tensor, native: bool = False
) -> list[torch.Tensor]:
    y = product(x, w, Product(FORMATS[name], "", None, native=native))
    return [y.detach(), *torch.autograd.grad(y, (x, w), g)]


@pytest.mark.parametrize("name", ["fp64", "fp32", "tf32", "bf16", "fp16", "e4m3", "e5m2"])
def test_the_table_of_numbers_is_torchs(name: str) -> None:
    number, info = NUMBERS[name], torch.finfo(dtype_of(NUMBERS[name]))
    if number is not TF32:
        assert (number.largest, number.epsilon) == (info.max, info.eps)
        assert (number.smallest_normal, number.smallest_subnormal) == (
            info.tiny,
            info.smallest_normal * info.eps,
        )
        assert number.bits == info.bits


def _codes(x: torch.Tensor, number, dim: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    amax = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = torch.exp2(torch.floor(torch.log2(number.largest / amax)))
    return (x * scale).to(dtype_of(number)), scale


@pytest.mark.parametrize("name", ["fp8_tensorwise", "fp8_rowwise"])
def test_fp8_products_are_those_of_torchs_kernel(name: str) -> None:
    x, w = operands()
    g = torch.randn(32, 48, generator=torch.Generator().manual_seed(1)) * 1e-4
    y, dx, dw = gradients(name, x, w, g)
    dim = None if name == "fp8_tensorwise" else -1
    of_g = FORMATS[name].g

    def kernel(left: torch.Tensor, right: torch.Tensor, number) -> torch.Tensor:
        (a, sa), (b, sb) = _codes(left, number, dim), _codes(right, E4M3, dim)
        inverse = (1 / sb).t().contiguous() if dim else 1 / sb
        return torch._scaled_mm(a, b.t(), 1 / sa, inverse, out_dtype=torch.float32)

    with torch.no_grad():
        for found, expected in (
            (y, kernel(x, w, E4M3)),
            (dx, kernel(g, w.t().contiguous(), of_g)),
            (dw, kernel(g.t().contiguous(), x.t().contiguous(), of_g)),
        ):
            assert torch.allclose(found, expected, rtol=2e-7, atol=1e-12)
        assert not torch.allclose(y, x @ w.t(), rtol=1e-3)
    for emulated, native in zip((y, dx, dw), gradients(name, x, w, g, native=True), strict=True):
        assert torch.allclose(emulated, native, rtol=2e-7, atol=1e-12)


def test_int8_is_arithmetic_on_whole_numbers() -> None:
    x, w = operands()
    y, _, _ = gradients("int8", x, w, torch.ones(32, 48))
    a, b = (127 / t.detach().abs().amax(-1, keepdim=True) for t in (x, w))
    codes = (x.detach() * a).round().long() @ (w.detach() * b).round().long().t()
    assert torch.allclose(y, codes / a / b.t(), rtol=1e-6)


def test_a_block_has_a_scale_of_its_own() -> None:
    x = torch.cat([torch.full((4, 32), 1e-6), torch.full((4, 32), 1e6)], dim=1).requires_grad_()
    w = torch.cat([torch.ones(4, 32), torch.zeros(4, 32)], dim=1).requires_grad_()
    for name, expected in (("mxfp8", 32e-6), ("fp8_rowwise", 0.0), ("fp8_tensorwise", 0.0)):
        y, _, _ = gradients(name, x, w, torch.ones(4, 4))
        assert y[0, 0] == pytest.approx(expected, rel=0.07), name


def test_a_block_that_is_not_full_counts_as_filled_with_zeros() -> None:
    x, w = (torch.randn(4, 40, generator=torch.Generator().manual_seed(n)).requires_grad_() for n in range(2))
    whole = gradients("mxfp8", x, w, torch.ones(4, 4))
    padded = [nn.functional.pad(t.detach(), (0, 24)).requires_grad_() for t in (x, w)]
    assert torch.equal(whole[0], gradients("mxfp8", *padded, torch.ones(4, 4))[0])


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so(name: str, value: float) -> None:
    x, w = operands()
    bad = x.detach().clone()
    bad[3, 5] = value
    y, _, dw = gradients(name, bad.requires_grad_(), w, torch.ones(32, 48))
    assert not y[3].isfinite().any()
    assert not dw.isfinite().all()


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_and_a_bias(name: str, dtype: torch.dtype) -> None:
    layer = nn.Linear(32, 16, dtype=dtype)
    convert(layer, Product(FORMATS[name], "", None, native=False))
    x = torch.zeros(2, 3, 32, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, layer.bias.expand(2, 3, 16))
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert not layer.weight.grad.any()


def test_gpt2s_linear_layer_is_the_same_product() -> None:
    layer, theirs = nn.Linear(32, 16), Conv1D(16, 32)
    with torch.no_grad():
        theirs.weight.copy_(layer.weight.t())
        theirs.bias.copy_(layer.bias)
    x, g = torch.randn(4, 32), torch.randn(4, 16)
    for module in (layer, theirs):
        convert(module, Product(FORMATS["fp8_rowwise"], "", None, native=False))
        module(x).backward(g)
    assert torch.equal(layer(x), theirs(x))
    assert torch.equal(layer.weight.grad, theirs.weight.grad.t())


def test_fp16_overflows_and_underflows_as_fp16_does() -> None:
    x = torch.full((1, 4), 300.0, requires_grad=True)
    y = product(x, torch.full((1, 4), 300.0), Product(FORMATS["fp16"], "", None, native=False))
    assert y.isinf().all()
    small = product(
        torch.full((1, 4), 1e-9), torch.full((1, 4), 300.0), Product(FORMATS["fp16"], "", None, native=False)
    )
    assert not small.any()


@pytest.mark.parametrize("name", ["fp8_tensorwise", "fp8_rowwise", "mxfp8"])
def test_large_numbers_in_fp16_are_emulated_as_the_kernel_multiplies_them(name: str) -> None:
    """Rounded up to 65536, which fp16 does not have; the products are finite."""
    x = torch.full((4, 32), 64000.0, dtype=torch.float16)
    w = torch.full((8, 32), 1e-3, dtype=torch.float16)
    y = product(x, w, Product(FORMATS[name], "", None, native=False))
    assert y.dtype == torch.float16
    assert (y / (32 * 64) - 1).abs().max() < 0.1


def test_rounding() -> None:
    assert round_to(torch.tensor([449.0, 1e6, 2.0**-10, 2.0**-11]), E4M3).float().tolist() == [448, 448, 0, 0]
    assert round_to(torch.tensor([6e4]), E5M2).float().item() == 57344
    assert round_to(torch.tensor([1 + 2.0**-10, 1 + 2.0**-11, 1 + 3 * 2.0**-11]), TF32).tolist() == [
        1 + 2.0**-10,
        1.0,
        1 + 2.0**-9,
    ]
    assert round_to(torch.tensor([float("inf"), 65520.0]), FP16).isinf().all()
    assert round_to(torch.tensor([2.5, 3.5, -200.0]), INT8).tolist() == [2, 4, -127]


def test_a_scale_is_that_of_the_whole_under_tensor_parallelism() -> None:
    """Ranks' parts differ in size by a factor of 50, so that scales of the parts would be others."""
    x, w = operands(rows=8, inputs=64, outputs=64)
    with torch.no_grad():
        x[:, 32:] *= 50
        w[:, 32:] *= 50
        w[32:] *= 50
    g = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)) * torch.ones(64).index_fill(
        0, torch.arange(32, 64), 50
    )
    halves = [slice(0, 32), slice(32, 64)]
    for name in ("fp8_tensorwise", "fp8_rowwise", "mxfp8", "int8"):
        y, dx, dw = gradients(name, x, w, g)
        rows = on_threads(name, "N", [(x, w[half], g[:, half]) for half in halves])
        assert torch.equal(torch.cat([r[0] for r in rows], dim=1), y), name
        assert torch.allclose(rows[0][1] + rows[1][1], dx, rtol=1e-5, atol=1e-5 * float(dx.abs().max())), name
        assert torch.equal(torch.cat([r[2] for r in rows]), dw), name
        columns = on_threads(name, "K", [(x[:, half], w[:, half], g) for half in halves])
        assert torch.allclose(
            columns[0][0] + columns[1][0], y, rtol=1e-5, atol=1e-5 * float(y.abs().max())
        ), name
        assert torch.equal(torch.cat([r[1] for r in columns], dim=1), dx), name
        assert torch.equal(torch.cat([r[2] for r in columns], dim=1), dw), name


def on_threads(name: str, cut: str, parts: list[tuple[torch.Tensor, ...]]) -> list[list[torch.Tensor]]:
    """(y, dx, dw) of each rank."""
    slots: list[torch.Tensor | None] = [None] * len(parts)
    barrier = threading.Barrier(len(parts))

    def rank(number: int) -> list[torch.Tensor]:
        x, w, g = (part.detach().contiguous() for part in parts[number])
        how = Product(
            FORMATS[name], cut, ThreadRanks(number, len(parts), slots=slots, barrier=barrier), native=False
        )
        y = product(x.requires_grad_(), w.requires_grad_(), how)
        return [y.detach(), *torch.autograd.grad(y, (x, w), g)]

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(rank, range(len(parts))))
