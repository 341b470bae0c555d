"""fp64 is fp64 everywhere: in norms, softmax, loss, gradients, and their sums over ranks."""

import dataclasses

import pytest

from tests.cases import Case, differences, model, on_ranks, reference


@pytest.mark.parametrize(
    "case",
    [
        Case("tp2", model("qwen3")),
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in (
                Case("pp2-zbv_zero_bubble"),
                Case("dp_shard2-zero3", overrides=(("recompute.kind", "full"),)),
                Case("pp2-tp2", overrides=(("recompute.kind", "selective"),)),
            )
        ),
    ],
    ids=lambda case: case.layout,
)
def test_a_layout_differs_by_the_rounding_of_fp64(case: Case) -> None:
    case = dataclasses.replace(case, precision="fp64")
    found = differences(on_ranks(case), reference(case))
    assert found["loss_rel"] < 1e-12, found
    assert found["grad_norm_rel"] < 1e-11, found
    assert found["grad_rel"] < 1e-10, found
    assert found["param_abs"] < 1e-9 * case.lr, found  # clipping divides in fp64, too
