"""parallel/apply.py: the order of transforms, and that none is dropped in silence: each drop is planted, on
ranks, and must be caught by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from hybridtrain.models.stage import Stage
from hybridtrain.parallel import apply, recompute
from tests.cases import Case, deepspeed, model, start
from tests.ranks import RankFailed, run_ranks

RECOMPUTE = (("recompute.kind", "full"),)
COMPILE = (("engine.compile", True), ("engine.compile_backend", "eager"))
FREEZE = ("model.layers.0.*",)
TIED = model(tie_word_embeddings=True)


def plant(name: str, fault: Callable[..., None]) -> None:
    """From here on, in this process, `fault(real, stage, context)` is done in the place of a transform."""
    (row,) = (row for row in apply.ORDER if row.name == name)
    planted = dataclasses.replace(row, apply=lambda stage, context: fault(row.apply, stage, context))
    apply.ORDER = tuple(planted if each is row else each for each in apply.ORDER)
    apply.RECOMPUTE = planted if name == apply.RECOMPUTE.name else apply.RECOMPUTE


def left_out(real: Any, stage: Stage, context: apply.Context) -> None:
    """Nothing is done."""


def undone_on_a_layer(real: Any, stage: Stage, context: apply.Context) -> None:
    layer = stage.part(f"{stage.structure.layers}.1")
    before = layer.forward
    real(stage, context)
    layer.forward = before


def one_parameter_more(real: Any, stage: Stage, context: apply.Context) -> None:
    real(stage, context)
    stage.get_parameter("model.norm.weight").requires_grad_(False)


def not_tied_again(real: Any, stage: Stage, context: apply.Context) -> None:
    stage.tie = lambda: None  # type: ignore[method-assign]
    real(stage, context)


def with_fault(case: Case, name: str, fault: Callable[..., None]) -> None:
    plant(name, fault)
    start(case)


@pytest.mark.parametrize(
    ("name", "fault", "case", "words"),
    [
        (
            "adapters",
            left_out,
            Case(overrides=(("adapters.kind", "lora"),)),
            "not done.*q_proj.lora_A.weight",
        ),
        ("tensor", left_out, Case("tp2"), "not done.*mlp.up_proj.weight"),
        ("freeze", left_out, Case(freeze=FREEZE), "not done.*layers.0.mlp.up_proj.weight"),
        (
            "freeze",
            one_parameter_more,
            Case(freeze=FREEZE),
            r"not done \[\], not asked for \['model.norm.weight'\]",
        ),
        ("recompute", left_out, Case(overrides=RECOMPUTE), "not done.*model.layers.3"),
        ("recompute", undone_on_a_layer, Case(overrides=RECOMPUTE), r"not done \['model.layers.1'\]"),
        ("recompute", left_out, deepspeed("single", overrides=RECOMPUTE), "not done.*model.layers.3"),
        ("compile", left_out, Case(overrides=COMPILE), "not done.*model.layers.3"),
        ("compile", undone_on_a_layer, Case(overrides=COMPILE), r"not done \['model.layers.1'\]"),
        ("shard", left_out, Case("dp_shard2"), "not done.*lm_head.weight"),
        ("shard", left_out, Case(precision="bf16_mixed"), "not done.*model.layers.3"),
        ("materialize", left_out, Case(), "not done.*lm_head"),
        ("materialize", not_tied_again, Case(fields=TIED), r"not asked for \['lm_head.weight'\]"),
    ],
    ids=lambda value: getattr(
        value, "__name__", value if isinstance(value, str) and " " not in value else None
    ),
)
def test_a_transform_that_is_dropped_is_caught(name, fault, case, words):
    with pytest.raises(RankFailed, match=f"transform {name}: .*{words}"):
        run_ranks(case.world_size, with_fault, case, name, fault)


def wrapped(case: Case) -> set[tuple[str, ...]]:
    return {
        tuple(recompute.wrappers(layer)) for stage in start(case).stages for _, layer in stage.layer_modules()
    }


@pytest.mark.parametrize(
    ("layout", "kind", "outermost_first"),
    [
        ("single", "selective", ("compile", "recompute")),
        ("single", "none", ("compile",)),
        ("tp2", "full", ("recompute", "local", "compile")),
    ],
)
def test_compilation_goes_around_recomputation(layout, kind, outermost_first):
    """Not where whole layers are recomputed under tensor parallelism."""
    case = Case(layout, overrides=(*COMPILE, ("recompute.kind", kind)))
    assert run_ranks(case.world_size, wrapped, case) == [{outermost_first}] * case.world_size


def test_the_order():
    assert [row.name for row in apply.ORDER] == [
        "adapters",
        "tensor",
        "convert",
        "double",
        "freeze",
        "recompute",
        "compile",
        "local",
        "shard",
        "materialize",
    ]
