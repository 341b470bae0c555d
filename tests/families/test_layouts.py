"""Model types without a line of code of their own, trained under layouts on real ranks as by one process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cases import Case, assert_parity, deepspeed
from tests.families.copies import EIGHT, fields_of

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("model_type", "layout"),
    [
        ("gemma2", "pp2"),
        ("gpt2", "dp_shard2-zero3"),
        ("mixtral", "dp_shard2-zero2"),
        *(
            pytest.param(model_type, layout, marks=SLOW)
            for model_type in EIGHT
            for layout in ("pp2", "pp2-dp_shard2-zero3")
        ),
        *(
            pytest.param(model_type, f"pp2-{schedule}", marks=SLOW)
            for model_type in ("gemma2", "gpt2")
            for schedule in ("interleaved_1f1b", "zbv_zero_bubble", "dualpipev")
        ),
    ],
)
def test_layouts_equal_the_plain_process(model_type: str, layout: str) -> None:
    assert_parity(Case(layout, fields_of(model_type)))


@pytest.mark.parametrize("model_type", ["gemma2", pytest.param("gpt2", marks=SLOW)])
def test_compiled_and_recomputed(model_type: str) -> None:
    overrides: tuple[tuple[str, Any], ...] = (
        ("recompute.kind", "full"),
        ("engine.compile", True),
        ("engine.compile_backend", "aot_eager"),
    )
    assert_parity(Case("pp2", fields_of(model_type), overrides=overrides))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gemma2", "gpt2", "bloom"])
@pytest.mark.parametrize("layout", ["dp_shard2-zero3", "pp2"])
def test_the_same_with_deepspeed(model_type: str, layout: str) -> None:
    assert_parity(deepspeed(layout, fields_of(model_type)))
