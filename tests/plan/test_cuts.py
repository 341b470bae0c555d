"""Rules for pipelines of models that give their layers more than hidden states."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from hybridtrain.config.schema import Config, ParallelConfig
from hybridtrain.errors import UserError
from hybridtrain.plan import cuts, memory, rules, stages
from hybridtrain.plan.batch import plan_batch
from hybridtrain.plan.capabilities import of_engine
from hybridtrain.plan.layout import ParallelLayout
from hybridtrain.types import ModelFacts

FACTS = ModelFacts(
    **{"model_type": "gemma3n_text", "layers": 35, "hidden": 8, "heads": 2, "kv_heads": 2, "head_dim": 4},
    **{"ffn": 16, "vocab": 100, "labels": (), "tied": True, "window": None, "max_positions": 64},
    **{"parameters": 10_000, "shared": {"embed": 800, "per_layer": 2_000}, "cuts": tuple(range(1, 19))},
)


def check(engine: str, *, pp: int, **options: Any) -> None:
    layout = ParallelLayout(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=pp)
    parallel = ParallelConfig(pp=pp, **options)
    rules.require(cuts.rules(parallel, layout=layout, facts=FACTS, capabilities=of_engine(engine)))


def test_stages_begin_where_the_model_can_be_cut() -> None:
    check("torch", pp=4, cut=[5, 9, 18])
    for options, words in (
        (
            {"pp": 20},
            ("parallel.pp=20: stages of this gemma3n_text model begin at layers 1-18", "parallel.pp=19"),
        ),
        ({"pp": 2, "cut": [20]}, (r"parallel.cut=[20]", "allowed: 1-18")),
    ):
        with pytest.raises(UserError) as refused:
            check("torch", **options)
        assert all(each in str(refused.value) for each in words)


def test_the_best_cut_is_one_of_those() -> None:
    config = Config()
    config.parallel = ParallelConfig(pp=2, dp_replicate=1)
    layout = ParallelLayout(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=2)
    config.data.seq_len = 8
    plan = plan_batch(config.batch, layout=layout, seq_len=8)
    facts = dataclasses.replace(FACTS, cuts=(3, 9))
    cut = stages.cut(config, parallel=config.parallel, pp=2, plan=plan, facts=facts)
    assert [layers.start for layers in cut.layers] == [0, 9]


@pytest.mark.parametrize(
    ("engine", "options", "why"),
    [
        ("deepspeed", {}, r"parallel.pp=2: every stage of a gemma3n_text model runs embed, per_layer"),
        ("torch", {"schedule": "zbv_zero_bubble"}, r"schedule=zbv_zero_bubble: .* cannot be split"),
    ],
)
def test_what_cannot_run_modules_on_every_stage(engine: str, options: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        check(engine, pp=2, **options)


def test_every_stage_needs_memory_for_them() -> None:
    middle: dict[str, Any] = {"layers": range(1, 2), "tp": 1}
    with_them, layer = memory.parameters_of_stage(FACTS, **middle)
    assert with_them == layer + 2_800
