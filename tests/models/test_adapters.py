"""Which linear layers get adapters, what their factors are at first, and how they are cut."""

import dataclasses

import pytest
import torch

from hybridtrain.config.schema import AdaptersConfig
from hybridtrain.errors import UserError
from hybridtrain.models import adapters
from hybridtrain.models.slicing import NOTHING
from tests.families.copies import config_of

LORA = AdaptersConfig(kind="lora", rank=4, alpha=8.0)
SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}


def config(model_type: str = "llama", **fields):
    return config_of(model_type, **{**SMALL, "num_key_value_heads": 2, **fields})


def test_all_linear_layers_inside_layers_get_adapters_unless_patterns_say_which():
    found = adapters.check(config(), LORA)
    assert len(found) == 2 * 7
    some = dataclasses.replace(LORA, match=["*.q_proj", "model.layers.1.mlp.*"])
    assert [linear.path for linear in adapters.check(config(), some)] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        *(f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")),
    ]


def test_routers_get_none_by_default():
    names = {linear.path.rpartition(".")[2] for linear in adapters.check(config("mixtral"), LORA)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(
    ("model_type", "pattern", "words"),
    [
        ("llama", "*.qproj", r"matches no linear layer(?s:.*)q_proj"),
        ("llama", "lm_head", "matches no linear layer"),
        ("llama", "*.q_proj.weight", "matches no linear layer"),
        ("mixtral", "*.experts", "all experts in one parameter"),
        ("mixtral", "*.experts.gate_up_proj", "all experts in one parameter"),
    ],
)
def test_a_pattern_that_matches_none_is_refused(model_type, pattern, words):
    with pytest.raises(UserError, match=words):
        adapters.check(config(model_type), dataclasses.replace(LORA, match=[pattern]))


def test_a_model_without_plain_linear_layers_is_refused():
    with pytest.raises(UserError, match="no linear layers of torch or transformers"):
        adapters.check(config_of("falcon", num_hidden_layers=2, hidden_size=64, num_attention_heads=4), LORA)


def test_factors_are_a_function_of_seed_and_name_and_begin_at_the_model():
    draw = adapters.source(lambda *_: torch.ones(()), LORA, config=config(), dtype=torch.float32, seed=3)
    name, shape, all_of = "model.layers.0.mlp.up_proj.lora_A.weight", (4, 64), slice(None)
    whole = draw(name, shape, (slice(0, 4), slice(0, 64)))
    assert whole.abs().max() <= 1 / 8  # 1 / sqrt(inputs)
    assert whole.std() > 0.05
    torch.testing.assert_close(draw(name, shape, (slice(1, 3), slice(16, 32))), whole[1:3, 16:32])
    other = draw(name.replace("0", "1"), shape, (slice(0, 4), slice(0, 64)))
    assert not torch.equal(other, whole)
    assert not draw(name.replace("_A", "_B"), (64, 4), (slice(0, 64), all_of)).any()
    assert draw("model.norm.weight", (64,), (all_of,)) == 1


def test_factors_are_cut_as_their_layer_is():
    cuts = {
        "self_attn.q_proj.weight": "0:q",
        "self_attn.k_proj.weight": "0:kv",
        "self_attn.o_proj.weight": "1:q",
    }
    slicing = dataclasses.replace(NOTHING, cuts=cuts, partial=frozenset({"mlp.up_proj.weight"}))
    found = adapters.sliced(slicing, LORA, config=config())
    assert found.cuts == {
        **cuts,
        "self_attn.q_proj.lora_B.weight": "0:q",
        "self_attn.k_proj.lora_B.weight": "0:kv",
        "self_attn.o_proj.lora_A.weight": "1:q",
    }
    assert found.partial == {
        "mlp.up_proj.weight",
        "mlp.up_proj.lora_A.weight",
        "mlp.up_proj.lora_B.weight",
        "self_attn.q_proj.lora_A.weight",
        "self_attn.k_proj.lora_A.weight",
        "self_attn.o_proj.lora_B.weight",
    }
    more = dataclasses.replace(LORA, dropout=0.1, dora=True)
    found, without = adapters.sliced(slicing, more, config=config()), found
    lengths = "self_attn.{}_proj.lora_magnitude_vector"
    assert found.cuts == {**without.cuts, lengths.format("q"): "0:q", lengths.format("k"): "0:kv"}
    assert found.partial - without.partial == {
        lengths.format("o"),
        "mlp.up_proj.lora_magnitude_vector",
    }
    assert found.dropped == ("self_attn.o_proj.lora_dropout",)  # whose channels ranks have parts of


def test_a_transposed_weight_is_cut_the_other_way_round():
    """GPT-2's, which are (inputs, outputs)."""
    slicing = dataclasses.replace(
        NOTHING, cuts={"attn.c_attn.weight": "1:q kv kv", "attn.c_proj.weight": "0:q"}
    )
    small = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 300, "n_positions": 64}
    found = adapters.sliced(slicing, LORA, config=config_of("gpt2", **small))
    assert found.cuts["attn.c_attn.lora_B.weight"] == "0:q kv kv"
    assert found.cuts["attn.c_proj.lora_A.weight"] == "1:q"
    assert found.partial == {"attn.c_attn.lora_A.weight", "attn.c_proj.lora_B.weight"}


def test_the_scale():
    assert adapters.scale_of(LORA) == 2.0
    assert adapters.scale_of(dataclasses.replace(LORA, rslora=True)) == 4.0
