"""Numbers in 8 bits, and the rounding of bf16 weights."""

import pytest
import torch

from hybridtrain.precision import eight_bit, rounding

VALUES = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("signed", [True, False])
def test_the_table_is_the_published_one(signed):
    """256 values in seven decades, each with twice as many as the one below it."""
    table = eight_bit.dynamic_map(signed)
    assert len(set(table)) == 256
    assert list(table) == sorted(table)
    counts = [sum(10.0**-power < value < 10.0 ** (1 - power) for value in table) for power in range(1, 8)]
    assert counts == [2**power * (1 if signed else 2) for power in range(6, -1, -1)]
    assert table[-1] == 1.0
    assert (min(table) < 0) is signed


@pytest.mark.parametrize("signed", [True, False])
def test_the_table_is_torchaos(signed):
    torchao = pytest.importorskip("torchao.optim.quant_utils")
    theirs = torchao.create_dynamic_map(signed=signed)
    assert torch.equal(torch.tensor(eight_bit.dynamic_map(signed)), torch.tensor(theirs))


def test_a_decoded_value_is_the_nearest_of_the_table():
    codes, scales = eight_bit.encode(VALUES, signed=True)
    assert (codes.shape, codes.dtype, scales.shape) == (VALUES.shape, torch.uint8, (64, 2))
    assert torch.equal(scales, VALUES.unflatten(-1, (-1, 128)).abs().amax(-1))
    decoded = eight_bit.decode(codes, scales, signed=True)
    every = torch.tensor(eight_bit.dynamic_map(True)) * scales.repeat_interleave(128, -1)[..., None]
    nearest = (every - VALUES[..., None]).abs().amin(-1)
    torch.testing.assert_close((decoded - VALUES).abs(), nearest, rtol=0, atol=1e-6)
    again = eight_bit.encode(decoded, signed=True)[0]
    assert (
        again != codes
    ).float().mean() < 0.01  # a block whose largest value is negative gets another scale


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_blocks_of_any_size(signed, size):
    values = VALUES.abs() * size
    codes, scales = eight_bit.encode(values, signed=signed)
    decoded = eight_bit.decode(codes, scales, signed=signed)
    torch.testing.assert_close(decoded, values, rtol=0, atol=float(values.max()) * 0.01)
    assert torch.equal(decoded == 0, values == 0) or size > 0
    zero_codes, zero_scales = eight_bit.zeros(values.shape, signed=signed, device=values.device)
    assert not eight_bit.decode(zero_codes, zero_scales, signed=signed).any()


def test_a_shard_has_the_codes_of_the_whole():
    codes, scales = eight_bit.encode(VALUES, signed=True)
    rows, columns = VALUES[40:], VALUES[:, 128:]
    for part, chosen in ((rows, (slice(40, None), slice(None))), (columns, (slice(None), slice(128, None)))):
        part_codes, part_scales = eight_bit.encode(part, signed=True)
        assert torch.equal(part_codes, codes[chosen])
        blocks = slice(chosen[1].start // 128 if chosen[1].start else 0, None)
        assert torch.equal(part_scales, scales[chosen[0], blocks])
    assert eight_bit.encode(VALUES[:0], signed=True)[0].shape == (0, 256)


def bits(count: int, *, name: str, step: int) -> torch.Tensor:
    index, key = torch.arange(count, dtype=torch.int32), rounding.key_of(seed=1, name=name)
    return rounding.random_bits(index, key=key, step=torch.tensor(float(step)))


def test_random_bits_are_uniform_and_independent():
    """Of elements, steps and parameters; 2^20 numbers, so that a correlation of 4e-3 is four deviations."""
    first = bits(1 << 20, name="a", step=1).double()
    others = [first[1:], bits(1 << 20, name="a", step=2), bits(1 << 20, name="b", step=1)]
    assert float(first.mean() / 2**16) == pytest.approx(0.5, abs=2e-3)
    assert float(first.std() / 2**16) == pytest.approx(12**-0.5, abs=1e-3)
    counts = torch.bincount(bits(1 << 20, name="a", step=1) >> 8, minlength=256)
    assert (counts - 4096).abs().max() < 6 * 64
    for other in others:
        pair = torch.stack([first[: len(other)], other.double()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 4e-3


def test_stochastic_rounding_is_right_on_average_and_keeps_what_is_not_finite():
    value = torch.full((1 << 20,), 1 + 2**-9 + 2**-12)
    rounded = rounding.round_stochastically(value, bits(1 << 20, name="a", step=1))
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    assert float(rounded.double().mean()) == pytest.approx(float(value[0]), abs=2**-7 * 2e-3)
    exact = torch.tensor([0.0, 1.0, -2.5, float("inf"), float("-inf")])
    assert torch.equal(rounding.round_stochastically(exact, bits(5, name="a", step=1)).float(), exact)
    nothing = torch.tensor([float("nan")])
    assert rounding.round_stochastically(nothing, torch.tensor([65535], dtype=torch.int32)).isnan().all()


def test_a_weight_and_its_compensation_are_an_fp32_number():
    """The weight is the nearest bf16; a tie goes away from zero, else 16 bits would not do."""
    ties = torch.tensor([1 + 2**-8, -1 - 2**-8, 1 + 3 * 2**-8])
    values = torch.cat([VALUES.flatten(), VALUES.flatten() * 1e-30, ties, torch.tensor([0.0, -0.0, 3e-45])])
    weight, compensation = rounding.split(values)
    assert (weight.dtype, compensation.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(rounding.joined(weight, compensation), values)
    assert torch.equal(weight[: VALUES.numel()], VALUES.flatten().bfloat16())
    assert weight[-6:-3].tolist() == [1 + 2**-7, -1 - 2**-7, 1 + 2**-6]
