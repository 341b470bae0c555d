"""What a layout's tensor parallelism does to a model, as planning sees it."""

from __future__ import annotations

from typing import Any

import pytest

from hybridtrain import engine as engines
from hybridtrain.config.compose import train_config
from hybridtrain.errors import UserError

MAMBA = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 256, "state_size": 8}


def settled(*words: str, model: dict[str, Any]) -> Any:
    fields = [f"model.config.{key}={value}" for key, value in model.items()]
    config = train_config(
        ["model.name=own", "train.steps=1", "data.path=there", "parallel.tp=2", *fields, *words]
    )
    return engines.settle(config, world_size=2)


def test_too_little_to_cut_is_refused_unless_it_is_asked_for() -> None:
    model = {"model_type": "mamba", **MAMBA}
    with pytest.raises(
        UserError, match=r"parallel.tp=2: .*0% of its layers' matrix products would be cut"
    ) as error:
        settled(model=model)
    assert "parallel.allow_replicated=true" in str(error.value)
    facts = settled("parallel.allow_replicated=true", model=model).facts
    assert (facts.sliced, facts.sequence) == (0.0, False)
    assert "mlp mixer" in facts.whole


def test_sequence_parallelism_that_is_not_exact_is_refused_or_left_out() -> None:
    model = {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256}
    assert not settled(model=model).facts.sequence
    with pytest.raises(UserError, match=r"sequence_parallel=true: a bloom model does not compute the same"):
        settled("parallel.sequence_parallel=true", model=model)


def test_what_autotp_cannot_cut_is_refused_with_deepspeed() -> None:
    model = {
        "model_type": "gpt2",
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 256,
        "n_positions": 4096,
    }
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    assert settled(model={**model, **dropout}).facts.sliced == 1.0
    with pytest.raises(UserError, match=r"parallel.tp=2: .*0% of its layers"):
        settled("engine=deepspeed", model={**model, **dropout})


@pytest.mark.parametrize(("length", "on"), [(64, True), (63, False)])
def test_rows_that_ranks_cannot_share_turn_it_off(length: int, on: bool) -> None:
    from hybridtrain.plan.tensor import sequence_parallel

    config = train_config(
        ["model=tiny", "train.steps=1", "data.path=there", "parallel.tp=2", f"data.seq_len={length}"]
    )
    plan = engines.settle(config, world_size=2).plan
    assert sequence_parallel(config.parallel, plan=plan, tp=2) == on
