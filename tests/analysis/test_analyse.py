"""Claims about models, and that what does not hold is refused."""

from __future__ import annotations

from typing import Any

import pytest

from hybridtrain.analysis import analyse
from hybridtrain.errors import UserError
from hybridtrain.models import reduced
from hybridtrain.models.stage import Stage
from tests.families.copies import EIGHT, config_of


@pytest.mark.parametrize("model_type", EIGHT)
def test_eight_model_types_can_be_cut_and_keep_documents_apart(model_type: str) -> None:
    assert analyse.refused(config_of(model_type)) == {}


@pytest.mark.parametrize(
    ("model_type", "fields", "refused"),
    [
        ("bert", {"is_decoder": True}, []),  # a bias with two names
        ("roberta", {"is_decoder": True}, ["documents"]),  # positions that do not begin at 0
        # twice as many key/value heads in some layers
        pytest.param("mimo_v2_flash", {}, [], marks=pytest.mark.slow),
        ("mllama", {}, []),  # layers that are not called
        ("recurrent_gemma", {}, ["documents"]),  # a buffer in bfloat16
    ],
)
def test_what_is_peculiar_to_a_model_type_is_no_obstacle(
    model_type: str, fields: dict[str, Any], refused: list[str]
) -> None:
    assert list(analyse.refused(config_of(model_type, **fields))) == refused


@pytest.mark.parametrize(
    ("model_type", "capability", "why"),
    [
        ("qwen3_next", "documents", "the gradient of"),  # a state that crosses documents
        ("falcon", "documents", "the gradient of"),  # its attention takes no masks of ours
        ("zaya", "pp", "is neither an embedding nor a norm"),
        ("llama4_text", "documents", "the gradient of"),  # a scale that depends on places in the row
    ],
)
def test_what_a_model_type_cannot_do_is_found(model_type: str, capability: str, why: str) -> None:
    assert why in analyse.refused(config_of(model_type))[capability]


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("gemma4_text", {}),  # inputs of all layers that require gradients
        ("gemma4", {}),  # the same, in a part of the model
        ("gemma3n_text", {"num_kv_shared_layers": 0}),  # and hidden states in four streams
        ("deepseek_v4", {}),  # hidden states in four streams
    ],
)
def test_what_layers_take_besides_hidden_states_is_computed_on_every_stage(
    model_type: str, fields: dict[str, Any]
) -> None:
    assert "pp" not in analyse.refused(config_of(model_type, **fields))


@pytest.mark.parametrize(
    ("model_type", "fields", "why"),
    [
        ("bert", {}, "tokens see those that follow"),
        ("roberta", {}, "tokens see those that follow"),
        ("hrm_text", {}, "no list of"),
        ("zamba2", {}, "are one parameter"),
        ("blt", {}, "its config has no number of layers"),
        ("ministral", {}, "transformers does not build it from this config"),  # without head_dim
        ("bigbird_pegasus", {}, "ties the head to the embedding, but transformers' model does not"),
    ],
)
def test_what_cannot_be_trained_is_refused(model_type: str, fields: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=f"model.config.model_type={model_type}: .*{why}"):
        analyse.refused(config_of(model_type, **fields))


def test_layers_numbered_anew_are_seen_where_an_even_cut_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second layer of Gemma 2 has a window: a stage that counts its layers from 0 has them wrong if it
    begins with the second, and right if it begins with the third.
    """
    real = Stage.__init__

    def counted_from_zero(stage: Any, config: Any, *, layers: range, **options: Any) -> None:
        real(stage, config, layers=layers, **options)
        own = stage._model.config
        own.layer_types = [*own.layer_types[-layers.start :], *own.layer_types[: -layers.start or None]]

    copy = analyse.copy_of(config_of("gemma2"), tp=1)
    assert analyse.stages(copy, cuts=(1,)).passed
    monkeypatch.setattr(Stage, "__init__", counted_from_zero)
    assert analyse.stages(copy, cuts=(2,)).passed
    assert not analyse.stages(copy, cuts=(1,)).passed


@pytest.mark.parametrize(
    ("model_type", "instead"),
    [
        ("bert", "model.config.is_decoder=true"),
        ("big_bird", "model.config.is_decoder=true model.config.attention_type=original_full"),
        ("xlm", "model.config.causal=true"),
    ],
)
def test_the_field_that_makes_a_model_causal_is_named(model_type: str, instead: str) -> None:
    with pytest.raises(UserError, match=f"try: *{instead}"):
        analyse.refused(config_of(model_type))


def test_a_copy_without_a_type_of_layer_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jamba's attention layers are counted: the first is the fifth."""
    monkeypatch.setattr(reduced, "_counted", lambda _: 0)
    with pytest.raises(
        UserError, match=r"model\.layers\.4\..* is not in both the model and its reduced copy"
    ):
        analyse.refused(config_of("jamba"))
