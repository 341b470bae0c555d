"""Dropout of 0.1 everywhere in GPT-2 and others: every layout drops what one plain process does."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridtrain.parity.verdict import GRADIENT_FLOOR
from tests.cases import GPT2, Case, assert_parity, model, on_ranks, reference, start
from tests.engine.test_state import both
from tests.engine.test_step_cost import watched_step
from tests.ranks import run_ranks

EAGER = ("model.attention", "eager")
NEOX = {
    **{"model_type": "gpt_neox", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8},
    **{"intermediate_size": 96, "vocab_size": 256, "max_position_embeddings": 64, "initializer_range": 0.1},
    **{"hidden_dropout": 0.1, "attention_dropout": 0.1},
}
BERT = {
    **{"model_type": "bert", "is_decoder": True, "hidden_size": 64, "num_hidden_layers": 4},
    **{"num_attention_heads": 8, "intermediate_size": 96, "vocab_size": 256, "max_position_embeddings": 64},
}
"""Its rates are 0.1 by default."""
LLAMA = model(attention_dropout=0.1)


def case(layout: str, *, fields: dict[str, Any] | None = None, kind: str = "none", **options: Any) -> Case:
    overrides = (EAGER, ("recompute.kind", kind), *options.pop("overrides", ()))
    return Case(layout, fields or GPT2, overrides=overrides, **options)


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        ("dp_shard2-zero3", "none"),
        ("tp2", "none"),
        ("pp2", "full"),
        *(
            pytest.param(layout, kind, marks=pytest.mark.slow)
            for layout, kind in (
                ("dp_replicate2", "none"),
                ("tp2-nosp", "selective"),
                ("pp2", "selective"),
                ("pp2-zbv_zero_bubble", "none"),
                ("pp2-zbv_zero_bubble", "full"),
                ("pp2-zbv_zero_bubble", "selective"),
                ("pp2-tp2", "full"),
            )
        ),
    ],
)
def test_every_layout_drops_the_same(layout: str, kind: str) -> None:
    found = assert_parity(case(layout, kind=kind))
    assert found["loss_rel"] < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "layout"),
    [(LLAMA, "dp_shard2-tp2-zero3"), (NEOX, "tp2"), (BERT, "pp2"), (BERT, "tp2-nosp")],
)
def test_other_models(fields: dict[str, Any], layout: str) -> None:
    trained = case(layout, fields=fields, kind="selective")
    ours, theirs = on_ranks(trained), reference(trained)
    floor = GRADIENT_FLOOR * theirs.grad_norms[0]  # the gradient of a bias of keys is nothing but rounding
    off = {
        name: float((ours.gradients[name] - wanted).norm() / wanted.norm().clamp(min=floor))
        for name, wanted in theirs.gradients.items()
    }
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-6)
    assert max(off.values()) < 1e-5, off


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        ("dp_shard2-zero1", GPT2),
        ("dp_shard2-zero2", GPT2),
        ("dp_shard2-zero3", GPT2),
        ("pp2", GPT2),
        ("tp2-nosp", LLAMA),
    ],
)
def test_deepspeed_drops_the_same(layout: str, fields: dict[str, Any]) -> None:
    kind = "full" if layout == "dp_shard2-zero3" else "none"
    assert_parity(case(layout, fields=fields, kind=kind, overrides=(("engine.kind", "deepspeed"),)))


def test_it_acts_and_follows_from_the_keys_of_rows() -> None:
    @dataclasses.dataclass(frozen=True)
    class Other(Case):
        def batches(self, step: int, *, dp_rank: int, dp: int) -> Any:
            found = super().batches(step, dp_rank=dp_rank, dp=dp)
            return [dataclasses.replace(batch, keys_B=batch.keys_B + 1) for batch in found]

    one = case("single", steps=1)
    off = {**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    others = Other(fields=GPT2, overrides=one.overrides, steps=1), case("single", fields=off, steps=1)
    [loss] = reference(one).losses
    assert [loss] == reference(one).losses
    assert all(abs(reference(other).losses[0] / loss - 1) > 1e-4 for other in others)


def evaluated(case: Case) -> tuple[float, float]:
    """(loss of an evaluation, of a step) over the same rows."""
    engine = start(case)
    batches = case.batches(0, dp_rank=0, dp=1)
    sums = engine.eval_step(batches)
    loss = float(engine.train_step(batches, lr=case.lr).loss)
    return sums.values["loss"] / sums.counts["loss"], loss


def test_an_evaluation_is_without_it() -> None:
    off = {**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    [(held_out, loss)] = run_ranks(1, evaluated, case("single"))
    assert held_out == pytest.approx(reference(case("single", fields=off, steps=1)).losses[0], rel=1e-6)
    assert abs(held_out / loss - 1) > 1e-4


def test_a_step_with_it_never_waits_for_the_device() -> None:
    assert run_ranks(1, watched_step, case("single", kind="full")) == [{}]


@pytest.mark.slow
def test_a_resumed_run_drops_what_it_would_have_dropped(tmp_path: Path) -> None:
    layout = case("pp2", kind="full")
    losses, resumed = both(layout, layout, tmp_path / "checkpoint")
    assert resumed == losses


@pytest.mark.slow
def test_in_bf16_ranks_agree() -> None:
    found = on_ranks(case("tp2", precision="bf16_mixed"))
    expected = reference(case("tp2", precision="bf16_mixed"))
    torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(expected.losses), rtol=2e-2, atol=0.0)
