"""Model types without a line of code of their own, trained under layouts on real ranks as by one process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cases import Case, assert_parity, deepspeed, differences, on_ranks, reference
from tests.families.copies import EIGHT, fields_of

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("model_type", "layout"),
    [
        ("gemma2", "pp2"),
        ("gpt2", "dp_shard2-zero3"),
        ("mixtral", "dp_shard2-zero2"),
        ("phi3", "tp2"),
        ("olmo2", "dp_shard2-tp2-zero3"),
        *(
            pytest.param(model_type, layout, marks=SLOW)
            for model_type in EIGHT
            for layout in ("pp2", "pp2-dp_shard2-zero3", "tp2", "pp2-tp2")
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


MORE = ("llama", "cohere2", "gemma3_text", "qwen3_moe", "deepseek_v3", "gpt_neox", "falcon", "stablelm")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [*EIGHT, *MORE])
def test_eight_processes(model_type: str) -> None:
    assert_parity(Case("pp2-dp_shard2-tp2-zero3", fields_of(model_type)))


@pytest.mark.parametrize("model_type", ["gemma2", pytest.param("gpt_oss", marks=SLOW)])
def test_more_ranks_than_key_value_heads(model_type: str) -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}
    assert_parity(Case("tp4", {**fields_of(model_type), **heads}))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16_mixed", "fp16_mixed"])
@pytest.mark.parametrize("model_type", ["gemma2", "gpt2", "phi3", "olmo2", "mixtral", "granite"])
def test_in_sixteen_bits(model_type: str, precision: str) -> None:
    """Compared with the plain process in the same precision: the order of additions differs."""
    small = (("precision.init_scale", 64.0),)  # no step is skipped
    case = Case("dp_shard2-tp2-zero3", fields_of(model_type), precision=precision, overrides=small)
    found = differences(on_ranks(case), reference(case))
    assert found["loss_rel"] < 2e-2, found
    assert found["grad_norm_rel"] < 5e-2, found


@pytest.mark.parametrize("layout", [pytest.param("tp2", marks=SLOW), "dp_shard2-zero3"])
def test_what_a_model_does_not_train_stays(layout: str) -> None:
    """AFMoE's biases of experts are parameters without a gradient, which are neither updated nor decayed."""
    assert_parity(Case(layout, fields_of("afmoe")))


@pytest.mark.parametrize("model_type", ["gemma2", pytest.param("gpt2", marks=SLOW)])
def test_compiled_and_recomputed(model_type: str) -> None:
    overrides: tuple[tuple[str, Any], ...] = (
        ("recompute.kind", "full"),
        ("engine.compile", True),
        ("engine.compile_backend", "aot_eager"),
    )
    assert_parity(Case("pp2", fields_of(model_type), overrides=overrides))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gemma2", "granite", "bloom"])
@pytest.mark.parametrize("layout", ["dp_shard2-zero3", "pp2", "tp2-nosp"])
def test_the_same_with_deepspeed(model_type: str, layout: str) -> None:
    assert_parity(deepspeed(layout, fields_of(model_type)))
