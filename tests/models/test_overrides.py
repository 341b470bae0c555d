"""Fields of a model that the user changes: what was asked for is what the modules compute, whichever
spelling config.json has."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from hybridtrain.analysis.facts import facts
from hybridtrain.config import schema
from hybridtrain.config.schema import ModelConfig
from hybridtrain.errors import UserError
from hybridtrain.models import build, overrides, parameters
from hybridtrain.models.build import hf_config, plain_model
from hybridtrain.models.init import draw
from hybridtrain.models.source import read_config
from tests.cases import at_the_head, model

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
QWEN = model(
    "qwen3",
    layer_types=["full_attention"] * 4,
    sliding_window=None,
    use_sliding_window=False,
    max_window_layers=28,
)
SOURCES: dict[str, dict[str, Any]] = {
    "v5": model(rope_parameters={"rope_theta": 500000.0, "rope_type": "default"}),
    "old": model(rope_theta=500000.0),
    "v5 llama3": model(rope_parameters={"rope_theta": 500000.0, **LLAMA3}),
    "old llama3": model(rope_theta=500000.0, rope_scaling=LLAMA3),
    "older llama3": model(
        rope_theta=500000.0,
        rope_scaling={**{k: v for k, v in LLAMA3.items() if k != "rope_type"}, "type": "llama3"},
    ),
    "v5 qwen3": QWEN | {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    "old qwen3": {k: v for k, v in QWEN.items() if k not in ("layer_types", "sliding_window")}
    | {"rope_theta": 1e6},
    "own pattern": QWEN
    | {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 3,
        "use_sliding_window": True,
    },
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
THETA = {"rope_theta": 500000.0}
"""That of the sources."""
MILLION = {"rope_theta": 1e6}
LLAMAS = ("v5", "old", "v5 llama3", "old llama3")
OF_LLAMA3 = ("v5 llama3", "old llama3", "older llama3")
Rope = dict[str, Any]
ROPE_CASES: list[tuple[str, dict[str, Any], Rope]] = [
    *[(source, {"rope_theta": 1e6}, MILLION | {"rope_type": "default"}) for source in ("v5", "old")],
    *[(source, {"rope_scaling": LINEAR}, THETA | LINEAR) for source in LLAMAS],
    *[(source, {"rope_parameters": LINEAR}, THETA | LINEAR) for source in (*LLAMAS, "older llama3")],
    *[(source, {"rope_parameters": {"rope_theta": 1e6}}, LLAMA3 | MILLION) for source in OF_LLAMA3],
    *[(source, {"rope_theta": 1e6}, LLAMA3 | MILLION) for source in ("v5 llama3", "old llama3")],
    *[
        (source, {"rope_scaling": {"factor": 16.0}}, LLAMA3 | THETA | {"factor": 16.0})
        for source in OF_LLAMA3
    ],
    *[
        (source, {"rope_scaling": None}, THETA | {"rope_type": "default"})
        for source in ("v5 llama3", "old llama3")
    ],
    ("v5", {"rope_scaling": {"type": "linear", "factor": 4.0}}, THETA | LINEAR),
    ("old", {"rope_scaling": YARN}, THETA | YARN),
    ("v5", MILLION | {"rope_parameters": LINEAR | MILLION}, LINEAR | MILLION),
]


def chosen_over(folder: Path, source: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(source))
    fields = read_config(ModelConfig(from_pretrained=str(folder), config=chosen))
    facts(fields)
    return fields


def loss_of_ours(fields: dict[str, Any]) -> float:
    """What the stage that trains computes."""
    ids = torch.arange(24)[None] * 7 % 256
    hidden, weight = at_the_head(fields, ids, torch.arange(24)[None], attention="sdpa", packed=False)
    return _loss(functional.linear(hidden, weight), ids)


def loss_of_transformers(right: dict[str, Any]) -> float:
    """What plain transformers computes from a config that says the right thing in one spelling."""
    ids = torch.arange(24)[None] * 7 % 256
    config = hf_config(right, chosen={}, attention="eager")
    source = draw(config, seed=0)
    plain = plain_model(config).eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(
                source(name, tuple(parameter.shape), tuple(slice(0, size) for size in parameter.shape))
            )
        return _loss(plain(input_ids=ids).logits, ids)


def _loss(logits: torch.Tensor, ids: torch.Tensor) -> float:
    return functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).item()


@pytest.mark.parametrize(("source", "chosen", "right"), ROPE_CASES)
def test_rotary_fields_are_in_force_and_the_others_stay(tmp_path, source, chosen, right):
    fields = chosen_over(tmp_path, SOURCES[source], chosen)
    config = hf_config(fields, chosen=chosen, attention="sdpa")
    assert config.rope_parameters == right
    plain = {key: value for key, value in SOURCES[source].items() if key not in overrides.ROPE}
    assert loss_of_ours(fields) == pytest.approx(
        loss_of_transformers(plain | {"rope_parameters": right}), abs=1e-6
    )
    assert (
        abs(
            loss_of_ours(fields)
            - loss_of_transformers(
                plain | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
            )
        )
        > 1e-5
    )


@pytest.mark.parametrize("source", ["v5 qwen3", "old qwen3"])
def test_a_window_is_in_force_where_layer_types_were_listed(tmp_path, source):
    fields = chosen_over(tmp_path, SOURCES[source], WINDOW)
    config = hf_config(fields, chosen=WINDOW, attention="sdpa")
    assert config.layer_types == ["sliding_attention"] * 4
    right = {key: value for key, value in SOURCES[source].items() if key != "layer_types"} | WINDOW
    assert loss_of_ours(fields) == pytest.approx(loss_of_transformers(right), abs=1e-6)
    assert abs(loss_of_ours(fields) - loss_of_ours(SOURCES[source])) > 1e-5
    assert facts(fields).window == 4


@pytest.mark.parametrize(
    ("source", "chosen", "key", "right"),
    [
        ("v5 qwen3", {"num_hidden_layers": 2}, "layer_types", ["full_attention"] * 2),
        ("v5 qwen3", {"num_hidden_layers": 6}, "layer_types", ["full_attention"] * 6),
        (
            "own pattern",
            {"num_hidden_layers": 3},
            "layer_types",
            ["sliding_attention", "full_attention", "sliding_attention"],
        ),
        ("own pattern", {"layer_types": ["full_attention"] * 4}, "layer_types", ["full_attention"] * 4),
        ("v5", {"num_attention_heads": 4}, "head_dim", 16),
        ("v5", {"head_dim": 32}, "head_dim", 32),
        ("v5 qwen3", {"num_attention_heads": 4}, "head_dim", 8),  # a field of its own there
    ],
)
def test_fields_that_follow_from_others_follow(tmp_path, source, chosen, key, right):
    start = SOURCES[source] | ({"head_dim": 8} if source == "v5" else {})
    config = hf_config(chosen_over(tmp_path, start, chosen), chosen=chosen, attention="sdpa")
    assert getattr(config, key) == right


def test_as_many_key_value_heads_as_heads_stay_as_many(tmp_path):
    chosen = {"num_attention_heads": 16}
    fields = chosen_over(tmp_path, SOURCES["v5"] | {"num_key_value_heads": 8}, chosen)
    assert hf_config(fields, chosen=chosen, attention="sdpa").num_key_value_heads == 16


def test_without_choices_config_json_is_taken_as_it_is(tmp_path):
    for source in SOURCES.values():
        assert chosen_over(tmp_path, source, {}) == source


NO_EFFECT = [
    ("v5", {"rope_scaling": {"rope_typ": "linear", "factor": 4.0}},
     "model.config.rope_scaling.rope_typ=linear",
     "try:     model.config.rope_scaling.rope_type=linear"),
    ("v5", {"rope_parameters": {"rope_type": "liner", "factor": 4.0}},
     "model.config.rope_parameters.rope_type=liner", "rope_type=linear"),
    ("v5", {"rope_scaling": {"rope_type": "linear"}},
     "model.config.rope_scaling.factor=(missing)", "needs factor"),
    ("v5", {"rope_scaling": {**LINEAR, "low_freq_factor": 1.0}},
     "model.config.rope_scaling.low_freq_factor=1.0", "rope_type=linear does not take it"),
    ("v5", {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 2e6}},
     "model.config.rope_parameters.rope_theta=2000000.0", "says otherwise"),
    ("v5", {"rope_scaling": "linear"}, "model.config.rope_scaling=linear", "not a mapping"),
    ("v5", {"partial_rotary_factor": 0.5}, "model.config.partial_rotary_factor=0.5", "would have no effect"),
    ("v5 qwen3", {"sliding_window": 4}, "model.config.sliding_window=4", "use_sliding_window=true"),
    ("v5 qwen3", {"use_sliding_window": True}, "model.config.use_sliding_window=True", "sliding_window=4096"),
    ("v5 qwen3", {"layer_types": ["sliding_attention"] * 4}, "model.config.layer_types=", "no effect"),
    ("own pattern", {"num_hidden_layers": 6}, "model.config.num_hidden_layers=6", "its own pattern"),
    ("own pattern", {"sliding_window": 5, "max_window_layers": 1},
     "model.config.max_window_layers=1", "its own pattern"),
    ("v5", {"dtype": "bfloat16"}, "model.config.dtype=bfloat16", "precision=bf16_mixed"),
    ("old", {"torch_dtype": "bfloat16"}, "model.config.torch_dtype=bfloat16", "precision=bf16_mixed"),
    ("v5", {"hidden_act": "sillu"}, "model.config.hidden_act=sillu", "hidden_act=silu"),
    ("v5", {"hiden_size": 64}, "model.config.hiden_size=64", "hidden_size"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "chosen", "field", "words"), NO_EFFECT)
def test_what_would_not_be_in_force_is_refused_by_name(tmp_path, source, chosen, field, words):
    with pytest.raises(UserError) as refused:
        hf_config(chosen_over(tmp_path, SOURCES[source], chosen), chosen=chosen, attention="sdpa")
    assert str(refused.value).startswith(field)
    assert words in str(refused.value)
    assert len(str(refused.value)) < 1500


def test_a_value_that_transformers_would_drop_is_refused(monkeypatch):
    """The check stands behind the merge: fields that reach transformers beside another spelling, as they did
    before there was one."""
    fields = SOURCES["v5"] | {"rope_theta": 1e6}
    monkeypatch.setattr(overrides, "rope_of", lambda _: {"rope_theta": 1e6})
    with pytest.raises(UserError, match=r"rope_theta=500000.0 instead of 1000000.0"):
        hf_config(fields, chosen={"rope_theta": 1e6}, attention="sdpa")


def test_the_table_of_rotary_kinds_is_that_of_transformers(caplog):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert set(overrides.ROPE_TYPES) - {"default"} <= set(ROPE_INIT_FUNCTIONS)
    values: dict[str, Any] = {
        "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "attention_factor": 1.5,
        "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
        "mscale_all_dim": 1.0, "truncate": True, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
    }  # fmt: skip
    logging.getLogger("transformers").propagate = True
    for kind, (needs, may) in overrides.ROPE_TYPES.items():
        rope = {"rope_type": kind, "rope_theta": 10000.0, **{key: values[key] for key in (*needs, *may)}}
        caplog.clear()
        assert (
            hf_config(
                model(rope_parameters=rope), chosen={"rope_parameters": rope}, attention="sdpa"
            ).rope_parameters
            == rope
        )
        assert "Unrecognized" not in caplog.text
        for key in needs:
            short = {name: value for name, value in rope.items() if name != key}
            with pytest.raises(UserError):
                hf_config(model(rope_parameters=short), chosen={}, attention="sdpa")


# -- patterns of parameter names -----------------------------------------------------------------------------


def settings(**model_options: Any) -> schema.Config:
    config = schema.Config()
    config.model = ModelConfig(config=model(), **model_options)
    return config


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_parameter_names_are_those_of_the_model(family, tied):
    config = hf_config(model(family, tie_word_embeddings=tied), chosen={}, attention="sdpa")
    assert sorted(parameters.parameter_names(config)) == sorted(
        name for name, _ in build.meta_model(config).named_parameters()
    )


def test_a_pattern_that_matches_nothing_is_refused_with_near_names():
    for wrong, near in (
        ("embed_tokens", "model.embed_tokens.weight"),
        ("model.layers.9.*", "model.layers.*"),
        ("*q_porj*", "q_proj"),
    ):
        with pytest.raises(UserError) as refused:
            parameters.check(settings(freeze=["model.embed_tokens.*", wrong]))
        assert str(refused.value).startswith(f"model.freeze=['{wrong}']")
        assert near in str(refused.value)
    # also where it matches on one stage alone
    parameters.check(settings(freeze=["model.embed_tokens.*", "model.layers.3.*"]))


def test_patterns_that_freeze_everything_are_refused():
    with pytest.raises(UserError, match="it freezes all parameters"):
        parameters.check(settings(freeze=["model.*", "lm_head.*"]))


def test_no_decay_patterns_match_something_too_but_for_the_default():
    parameters.check(settings())  # "*.bias" of the default, in a model without biases
    config = settings()
    config.optim.no_decay = ["*norm*", "*embed_tokens*"]
    parameters.check(config)
    config.optim.no_decay = ["*norm*", "*embeding*"]
    with pytest.raises(UserError, match=r"optim\.no_decay=\['\*embeding\*'\]"):
        parameters.check(config)


def test_infinities_of_config_json_are_numbers():
    fields = {"limit": [0.0, {"__float__": "Infinity"}], "of": {"it": {"__float__": "-Infinity"}}}
    assert overrides.numbers(fields) == {"limit": [0.0, float("inf")], "of": {"it": float("-inf")}}


def test_rotary_fields_of_each_type_of_layers_are_merged():
    source = {
        "rope_parameters": {"full_attention": {"rope_theta": 1.0}, "sliding_attention": {"rope_theta": 2.0}}
    }
    chosen = {"rope_parameters": {"sliding_attention": {"rope_theta": 3.0}}}
    merged = overrides.merge({"model_type": "gemma3_text", **source}, chosen)["rope_parameters"]
    assert merged == {"full_attention": {"rope_theta": 1.0}, "sliding_attention": {"rope_theta": 3.0}}


@pytest.mark.parametrize(
    ("effective", "chosen", "same"),
    [
        ((0.0, 1.0), [0.0, 1.0], True),
        ({"size": 3, "other": 1}, {"size": 3}, True),
        ({"size": 4, "other": 1}, {"size": 3}, False),
        ({"other": 1}, {"size": None}, False),
    ],
)
def test_of_a_config_in_a_config_what_was_chosen_is_compared(effective, chosen, same):
    assert overrides.same(effective, chosen) is same
