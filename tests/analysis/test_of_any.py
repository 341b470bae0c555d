"""Facts of model types that config.json alone does not tell."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridtrain.analysis import of_any
from hybridtrain.analysis.facts import facts_of
from hybridtrain.analysis.of_layout import facts_of_layout
from hybridtrain.config.compose import train_config
from hybridtrain.errors import UserError
from hybridtrain.models import build
from hybridtrain.models.source import read_config
from hybridtrain.plan import layout as layouts
from hybridtrain.plan import memory
from hybridtrain.plan.batch import plan_batch
from hybridtrain.types import ModelFacts


def facts_of_file(name: str, *words: str) -> ModelFacts:
    return facts_of(train_config([f"model={name}", *words]).model)


def test_experts_that_a_token_does_not_use_and_layers_without_a_window_are_counted() -> None:
    """Published: 46.7 billion parameters, 12.9 of them for a token; 26 layers, every second with a window."""
    mixtral, gemma = facts_of_file("mixtral_8x7b"), facts_of_file("gemma2_2b")
    assert (mixtral.parameters, mixtral.parameters - mixtral.inactive) == (46_702_792_704, 12_879_925_248)
    assert (gemma.window, gemma.full_layers, gemma.inactive) == (4096, tuple(range(1, 26, 2)), 0)


def test_layers_may_differ() -> None:
    """Qwen3-MoE with two dense layers first; a token uses 8 of 128 experts of the others."""
    words = ("model.config.mlp_only_layers=[0,1]", "model.config.num_hidden_layers=4")
    fields = read_config(train_config(["model=qwen3_30b_a3b", *words]).model)
    config = build.hf_config(fields, chosen={}, attention="sdpa")
    attention, expert = 2048 * 128 * (2 * 32 + 2 * 4) + 2 * 128 + 2 * 2048, 3 * 2048 * 768
    dense, sparse = attention + 3 * 2048 * 6144, attention + 2048 * 128 + 128 * expert
    expected = (dense, dense, sparse, sparse), (0, 0, 120 * expert, 120 * expert)
    assert of_any._of_layers(build.meta_model(config), config) == expected


def test_stages_have_every_parameter_of_unequal_layers() -> None:
    """GPT-2 has positions before its layers, and embedding and head are one matrix: both ends hold it."""
    gpt2 = facts_of_file("gpt2")
    parts = [range(5), range(5, 11), range(11, 12)]
    sizes = [memory.parameters_of_stage(gpt2, layers=part, tp=1)[0] for part in parts]
    assert sum(sizes) - gpt2.vocab * gpt2.hidden == gpt2.parameters


def examined_again(fields: object, *, attention: str) -> None:
    pytest.fail(f"examined again with {attention}: {fields}")


def test_an_analysis_is_kept_for_the_same_config_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = facts_of_file("gpt2")
    monkeypatch.setattr(of_any, "examined", examined_again)
    assert facts_of_file("gpt2") == first
    with pytest.raises(pytest.fail.Exception, match="again with eager"):
        facts_of_file("gpt2", "model.attention=eager")
    [kept] = (tmp_path / "hybridtrain" / "analysis").glob("*.json")
    kept.write_text("{}")  # of another version, or damaged
    with pytest.raises(pytest.fail.Exception):
        facts_of_file("gpt2")


def test_a_model_whose_own_code_fails_is_refused_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object, *, attention: str) -> None:  # noqa: ARG001 - the signature of _examined
        raise IndexError("list index out of range")

    monkeypatch.setattr(of_any, "examined", fails)
    with pytest.raises(
        UserError, match=r"model_type=gpt2: a reduced copy of it fails \(IndexError: list index"
    ):
        facts_of_file("gpt2", "model.config.n_layer=5")


def test_a_layout_that_is_advised_can_be_run() -> None:
    config = train_config(["model=mixtral_8x7b", "train.steps=1", "data.path=there"])
    facts, parallel = facts_of(config.model), config.parallel
    layout = layouts.resolve(parallel, world_size=1)
    plan = plan_batch(config.batch, layout=layout, seq_len=config.data.seq_len)
    with pytest.raises(UserError, match="dp_shard") as refused:
        memory.check(config, layout=layout, plan=plan, facts=facts, available=16 << 30, place="GPU memory")
    assert "tp8" in str(refused.value)
    cut = facts_of_layout(facts, config.model, parallel, tp=8, engine="torch")
    assert cut.sliced > 0.99
    assert not cut.refused


def test_dropout_that_acts_is_refused_with_the_fields_to_set() -> None:
    with pytest.raises(UserError, match=r"model.config.attn_pdrop=0.1: random numbers") as refused:
        facts_of_file("gpt2", "model.config.attn_pdrop=0.1")
    assert "model.attention=eager, which takes more time" in str(refused.value)
    assert facts_of_file("gpt2", "model.config.resid_pdrop=0.1").dropped["mlp.dropout"] == 0.1
