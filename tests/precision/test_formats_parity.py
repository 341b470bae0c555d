"""Formats of linear layers under every layout, against one plain process that rounds alike.

Pipeline stages and ZeRO change no operand: equal to a single rank of the engine. Against other code, and
under tensor parallelism, sums are added up in another order. With one power-of-two scale a tensor that flips
no rounding in fp32: the first step's gradients equal to 1e-5. With other formats some values are rounded the
other way, and each moves the values after it: there the difference is to be no larger than that of the format
itself.
"""

import dataclasses
from typing import Any

import pytest

from tests import cases
from tests.cases import Case
from tests.ranks import RankFailed


def case(layout: str, compute: str, **given: Any) -> Case:
    return Case(layout, overrides=(("precision.compute", compute),), **given)


def compare(layout: str, compute: str, **given: Any) -> dict[str, float]:
    of = case(layout, compute, **given)
    return cases.differences(cases.on_ranks(of), cases.reference(of))


def assert_exact(found: dict[str, float]) -> None:
    assert found["loss_rel"] < 1e-5, found
    assert found["grad_norm_rel"] < 1e-5, found
    assert found["grad_rel"] < 1e-5, found


def test_a_scale_is_that_of_the_whole_operand() -> None:
    assert_exact(compare("dp_shard2-tp2", "fp8_tensorwise", steps=1))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "tp4", "pp2-tp2", "pp2-dp_shard2-tp2-zero3"])
def test_tensorwise_under_tensor_parallelism(layout: str) -> None:
    assert_exact(compare(layout, "fp8_tensorwise"))


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["fp8_tensorwise", "fp8_rowwise", "mxfp8", "int8", "bf16", "fp16"])
@pytest.mark.parametrize("layout", ["dp_shard2-zero3", "pp2-zbv_zero_bubble", "pp2-dp_replicate2"])
def test_pipelines_and_data_parallelism_change_nothing(layout: str, compute: str) -> None:
    """But the order in which gradients of micro-batches are added up over data ranks, which the weights of
    later steps have in their last bits.
    """
    single, ours = cases.on_ranks(case("single", compute)), cases.on_ranks(case(layout, compute))
    found = cases.differences(ours, single)
    assert found["grad_rel"] < 2e-7, found
    same = 1 if "dp_" in layout else len(single.losses)
    assert ours.losses[:same] == single.losses[:same]
    assert found["loss_rel"] < 1e-6, found


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["fp8_rowwise", "mxfp8", "int8", "bf16", "fp16"])
@pytest.mark.parametrize("layout", ["single", "tp2"])
def test_the_difference_to_one_process_is_no_larger_than_that_of_the_format(
    layout: str, compute: str
) -> None:
    fields = cases.model(hidden_size=128, intermediate_size=128)  # whole blocks of 32 on each of two ranks
    of = dataclasses.replace(case(layout, compute), steps=1, fields=fields)
    ours, one = cases.on_ranks(of), cases.reference(of)
    exact = cases.reference(Case("tp2", fields, steps=1))
    assert ours.losses[0] == pytest.approx(one.losses[0], rel=5e-3)
    for name, gradient in one.gradients.items():
        noise = (gradient - exact.gradients[name]).norm()
        assert (ours.gradients[name] - gradient).norm() <= 1.1 * noise, name
        assert noise > 1e-4 * gradient.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "compute", "heads", "words"),
    [
        ("tp2", "mxfp8", 4, "no multiple of 32"),
        (
            "tp4",
            "fp8_tensorwise",
            2,
            "computes a part of the output gradient of model.layers.0.self_attn.k_proj",
        ),
    ],
)
def test_a_scale_that_ranks_cannot_share_is_refused(
    layout: str, compute: str, heads: int, words: str
) -> None:
    fields = cases.model(num_key_value_heads=heads)
    with pytest.raises(RankFailed, match=words):
        cases.on_ranks(case(layout, compute, fields=fields))
