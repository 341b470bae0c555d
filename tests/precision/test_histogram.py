"""Shares that follow from an exponent histogram are those of a cast, in every format at every scale."""

import json
import math

import pytest
import torch

from hybridtrain.config.schema import PrecisionConfig
from hybridtrain.parallel.monitor import _histogram, _snr
from hybridtrain.plan.formats import NUMBERS
from hybridtrain.precision.histogram import BINS, NON_FINITE, shares, tensorwise_scale
from hybridtrain.precision.numerics import (
    SNR_BINS,
    Sample,
    Statistics,
    Update,
    formats_of,
    median_snr,
    sample_of,
)
from hybridtrain.precision.round import dtype_of


def spread(count: int) -> torch.Tensor:
    """Numbers of many magnitudes, and zeros."""
    torch.manual_seed(0)
    numbers = torch.randn(count) * torch.exp2(torch.randint(-40, 30, (count,)).float())
    numbers[::17] = 0
    return numbers


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "fp16", "bf16"])
@pytest.mark.parametrize("scale", [-12, 0, 7])
def test_shares_are_those_of_the_cast(name, scale):
    form, numbers = NUMBERS[name], spread(4096)
    scaled = numbers.double() * 2.0**scale
    bounded = scaled.clamp(-form.largest, form.largest).float()
    vanished = ((bounded.to(dtype_of(NUMBERS[name])).float() == 0) & (numbers != 0)).float().mean()
    above = (scaled.abs() >= 2.0 ** (math.frexp(form.largest)[1])).float().mean()
    found = shares(_histogram(numbers).tolist(), form, scale=scale)
    assert found.underflow == pytest.approx(float(vanished), abs=1e-7)
    assert found.overflow == pytest.approx(float(above), abs=1e-7)
    assert vanished > 0.1 or name == "bf16"


def test_the_tensorwise_scale_brings_the_largest_number_to_the_top():
    numbers = torch.tensor([0.0, 3.0, -0.01])
    counts = _histogram(numbers).tolist()
    assert tensorwise_scale(counts, NUMBERS["e4m3"]) == 7  # 3 x 2^7 = 384, of at most 448
    assert tensorwise_scale([5] + [0] * 255, NUMBERS["e4m3"]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_bin_is_the_exponent_as_float32(dtype):
    numbers = torch.tensor([0.0, 1.0, -1.5, 2.0, 0.25, math.inf, -math.inf, math.nan]).to(dtype)
    counts = _histogram(numbers).tolist()
    assert {index: count for index, count in enumerate(counts) if count} == {
        0: 1, 125: 1, 127: 2, 128: 1, NON_FINITE: 3,
    }  # fmt: skip
    assert len(counts) == BINS


def test_an_outlier_that_dominates_the_power_does_not_hide_what_is_lost():
    """One of 64 channels is 1e6 times as large: in e4m3 the others are flushed to zero."""
    torch.manual_seed(0)
    rows = torch.randn(256, 64)
    healthy = median_snr(_snr(rows, "e4m3", top=rows.abs().max()).tolist())
    assert healthy == pytest.approx(31.5, abs=1)
    rows[:, 5] *= 1e6
    assert median_snr(_snr(rows, "e4m3", top=rows.abs().max()).tolist()) < 1
    rows[:, :60] = 0  # dead channels do not count
    assert sum(_snr(rows, "e4m3", top=rows.abs().max()).tolist()) == 4
    assert median_snr([0.0] * SNR_BINS) is None


def sample(**changes):
    histogram = tuple(_histogram(spread(4096)).tolist())
    roles = {"x": Statistics(histogram, 3.5, 0.25, 31.5), "y": Statistics((), math.inf, None, None)}
    values = {
        "step": 50,
        "loss_scale": 65536.0,
        "skipped": False,
        "formats": formats_of(PrecisionConfig(kind="fp16_mixed")),
        "modules": {"model.norm": roles},
        "parameters": {"model.norm.weight": Update(0.5, 1e-3, 0.96875, 0.25)},
    }
    return Sample(**values | changes)


def test_a_line_can_be_read_back():
    line = json.loads(json.dumps(sample().line(), allow_nan=False))
    assert sample_of(line) == sample()
    assert len(json.dumps(line)) < 1500


@pytest.mark.parametrize(
    "damage",
    [
        {"histogram": [[3, -1]]},
        {"histogram": [[256, 1]]},
        {"histogram": [[3, 1], [3, 1]]},
        {"histogram": 7},
        {"histogram": [[3, 1]], "amax": "x"},
    ],
)
def test_a_damaged_line_is_no_sample(damage):
    line = json.loads(json.dumps(sample().line()))
    line["modules"]["model.norm"]["x"] |= damage
    with pytest.raises((ValueError, KeyError, TypeError)):
        sample_of(line)


def test_trackers_get_the_worst():
    found = sample().aggregates()
    assert found["numerics/worst_underflow"] == sample().modules["model.norm"]["x"].shares("fp16").underflow
    assert found["numerics/worst_overflow"] > 0.05
    assert found["numerics/non_finite"] == 1
    assert found["numerics/worst_lost_updates"] == 0.25
