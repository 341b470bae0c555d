"""Codes and the numbers they stand for; GPTQ; scales of inputs."""

import pytest
import torch

from hybridtrain.errors import UserError
from hybridtrain.quantize import gptq, schemes
from hybridtrain.quantize.grids import FP4, grid_of
from hybridtrain.quantize.inputs import Seen, rounding
from tests.runs import four_parts

NAMES = (
    *("int2", "int3-g32", "int4-g32", "int4-g32-affine", "int4-row-affine", "int8", "int8-tensor", "int16"),
    *("fp8_e4m3", "fp8_e5m2-tensor", "nf4", "nvfp4", "mxfp4", "codebook2", "codebook4"),
)


def parse(text: str) -> schemes.Scheme:
    return schemes.parse(text, field="quantize.scheme")


def weights() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(24, 128) * torch.rand(24, 1) * 3


@pytest.mark.parametrize("name", NAMES)
def test_no_other_code_is_nearer(name: str) -> None:
    weight = weights()
    grid = grid_of(weight, parse(name))
    codes = grid.nearest(weight, start=0)
    found = (grid.values(codes, start=0) - weight).abs()
    if codes.is_floating_point() and codes.element_size() == 1:
        others = torch.arange(256, dtype=torch.uint8).view(codes.dtype)
        others = others[others.float().isfinite()]
    else:
        others = torch.arange(int(codes.min()), int(codes.max()) + 1, dtype=torch.int32)
    others = others if len(others) <= 256 else others[:: len(others) // 256]
    for other in others:
        there = (grid.values(torch.full_like(codes, other.item()), start=0) - weight).abs()
        assert (found <= there * (1 + 1e-6) + 1e-9).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_column_alone_is_rounded_as_in_the_matrix(name: str) -> None:
    weight = weights()
    grid = grid_of(weight, parse(name))
    whole = grid.rounded(weight, start=0)
    for column in (0, 31, 32, 127):
        assert torch.equal(grid.rounded(weight[:, column : column + 1], start=column)[:, 0], whole[:, column])


def test_numbers_that_the_formats_have() -> None:
    weight = weights()
    four = grid_of(weight, parse("mxfp4"))
    assert (four.scale_NG.log2() == four.scale_NG.log2().round()).all()
    unit = four.rounded(weight, start=0) / four.scale_NG.repeat_interleave(32, 1)
    assert set(unit.abs().unique().tolist()) <= set(FP4)
    scales = grid_of(weight, parse("nvfp4")).scale_NG
    of_scales = scales / (scales.max() / 448)
    assert torch.allclose(of_scales.to(torch.float8_e4m3fn).float(), of_scales, rtol=1e-6)
    assert grid_of(weight, parse("int4-g32")).nearest(weight, start=0).abs().max() == 7
    zero = grid_of(torch.zeros(4, 64), parse("int4-g32-affine"))
    assert zero.rounded(torch.zeros(4, 64), start=0).eq(0).all()


def test_more_bits_are_nearer_and_a_codebook_beats_a_uniform_grid() -> None:
    weight = weights()

    def error(name: str) -> float:
        return (grid_of(weight, parse(name)).rounded(weight, start=0) - weight).square().mean().item()

    assert error("int2") > error("int3") > error("int4") > 100 * error("int8-g32")
    assert error("int4-g32") > error("int4-g32-affine")
    assert error("codebook4") < error("int4-row")


def inputs() -> torch.Tensor:
    """Correlated, as those of layers are."""
    torch.manual_seed(2)
    return torch.randn(512, 128) @ (torch.randn(128, 128) * 0.3 + torch.eye(128))


@pytest.mark.parametrize("name", ["int4-g32-gptq", "int3-g32-affine-gptq", "nf4-gptq", "codebook3-gptq"])
def test_gptq_changes_the_outputs_less(name: str) -> None:
    x, weight, scheme = inputs(), weights(), parse(name)
    grid, codes = gptq.quantise(weight, x.t() @ x, scheme, path="up", field="quantize.scheme")
    better = (x @ (grid.values(codes, start=0) - weight).t()).square().mean()
    rounded = (x @ (grid_of(weight, scheme).rounded(weight, start=0) - weight).t()).square().mean()
    assert better < 0.6 * rounded


def test_gptq_with_independent_inputs_is_rounding() -> None:
    weight, scheme = weights(), parse("int4-g32-gptq")
    grid, codes = gptq.quantise(weight, torch.eye(128), scheme, path="up", field="quantize.scheme")
    assert torch.equal(codes, grid.nearest(weight, start=0))


def test_gptq_spreads_what_blocks_of_columns_lose() -> None:
    """As if all columns were one block: each error is spread over all later columns at once."""
    torch.manual_seed(4)
    x, weight = torch.randn(600, 300) @ torch.randn(300, 300), torch.randn(8, 300)
    scheme = parse("int4-g30-gptq")
    grid, codes = gptq.quantise(weight, x.t() @ x, scheme, path="up", field="quantize.scheme")
    order = (x.t() @ x).diagonal().argsort(descending=True)
    hessian = x[:, order].t() @ x[:, order]
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(300)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    rest, expected = weight[:, order], torch.zeros_like(codes)
    for column, place in enumerate(order.tolist()):
        here = rest[:, column : column + 1]
        code = grid.nearest(here, start=place)
        expected[:, place] = code[:, 0]
        error = (here - grid.values(code, start=place)) / upper[column, column]
        rest[:, column + 1 :] -= error * upper[column, column + 1 :]
    assert (codes == expected).float().mean() > 0.999  # sums in another order, near a tie


def test_gptq_with_dead_inputs_and_with_none_that_are_finite() -> None:
    x, weight, scheme = inputs(), weights(), parse("int4-g32-gptq")
    x[:, 5] = 0
    grid, codes = gptq.quantise(weight, x.t() @ x, scheme, path="up", field="quantize.scheme")
    assert grid.values(codes, start=0).isfinite().all()
    assert codes[:, 5].eq(0).all()
    with pytest.raises(UserError) as caught:
        gptq.quantise(weight, torch.full((128, 128), torch.nan), scheme, path="up", field="quantize.scheme")
    assert "the inputs of up on the calibration rows have no Cholesky factor" in str(caught.value)
    with pytest.raises(UserError) as caught:
        gptq.check_tokens(100, inputs=128, path="up", scheme=scheme, field="quantize.rows")
    assert "fewer than the 128 inputs of up" in four_parts(str(caught.value), "quantize.rows")


def test_one_scale_of_inputs() -> None:
    """An outlier among many values: the smallest squared error is not at the largest value."""
    torch.manual_seed(6)
    x = torch.randn(4096, 16)
    x[0, 0] = 40.0
    found = {}
    for name in ("minmax", "percentile", "mse"):
        seen = Seen(parse("int8-a8s" + ("" if name == "mse" else f"_{name}")))
        for part in x.split(1024):
            seen.add(part)
        found[name] = seen.scale().item() * 127
    assert found["minmax"] == pytest.approx(40, rel=0.01)
    assert found["percentile"] == pytest.approx(x.abs().quantile(0.999).item(), rel=0.02)
    assert 16 <= found["mse"] < 39

    def error(largest: float) -> float:
        scale = torch.tensor(largest / 127)
        [rounded] = rounding(parse("int8-a8s"), scale)(None, (x,))
        return (rounded - x).square().mean().item()

    assert error(found["mse"]) < 0.9 * error(found["minmax"])
    assert error(found["mse"]) < error(found["percentile"])


def test_one_scale_sees_every_input() -> None:
    """Of a layer with many inputs a part of the values is looked at: not the same inputs of each token."""
    torch.manual_seed(7)
    x = torch.randn(1024, 1024)
    x[:, 5] *= 60
    found = Seen(parse("int8-a8s"))
    found.add(x)
    [rounded] = rounding(parse("int8-a8s"), found.scale())(None, (x,))
    assert (rounded - x).square().sum() < 0.03 * x.square().sum()


def test_a_scale_for_each_token() -> None:
    x = torch.randn(3, 5, 64) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    x[0, 0] = 0
    for name, share in (("int8-a8", 1 / 250), ("fp8_e4m3-a8", 1 / 15)):
        [rounded] = rounding(parse(name), None)(None, (x,))
        assert ((rounded - x).abs() <= x.abs().amax(-1, keepdim=True) * share).all()
        assert rounded[0, 0].eq(0).all()
