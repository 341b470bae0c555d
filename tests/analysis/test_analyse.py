"""Claims about models, and that what does not hold is refused."""

from __future__ import annotations

from typing import Any

import pytest

from hybridtrain.analysis import analyse
from hybridtrain.errors import UserError
from tests.families.copies import EIGHT, config_of


@pytest.mark.parametrize("model_type", EIGHT)
def test_eight_model_types_can_be_cut_and_keep_documents_apart(model_type: str) -> None:
    assert list(analyse.refused(config_of(model_type))) == ["tp"]


@pytest.mark.parametrize(
    ("model_type", "capability", "why"),
    [
        ("qwen3_next", "documents", "the gradient of"),  # a state that crosses documents
        ("falcon", "documents", "the gradient of"),  # its attention takes no masks of ours
        ("zaya", "pp", "is neither an embedding nor a norm"),
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
    ],
)
def test_what_cannot_be_trained_is_refused(model_type: str, fields: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=f"model.config.model_type={model_type}: .*{why}"):
        analyse.refused(config_of(model_type, **fields))
