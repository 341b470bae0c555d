"""Claims about models, and that what does not hold is refused."""

from __future__ import annotations

from typing import Any

import pytest

from hybridtrain.analysis import analyse
from hybridtrain.errors import UserError
from hybridtrain.models.stage import Stage
from tests.families.copies import EIGHT, config_of


@pytest.mark.parametrize("model_type", EIGHT)
def test_eight_model_types_can_be_cut_and_keep_documents_apart(model_type: str) -> None:
    assert analyse.refused(config_of(model_type)) == {}


@pytest.mark.parametrize(
    ("model_type", "capability", "why"),
    [
        ("qwen3_next", "documents", "the gradient of"),  # a state that crosses documents
        ("falcon", "documents", "the gradient of"),  # its attention takes no masks of ours
        ("hy_v4", "pp", "hidden states between its layers have the shape"),
        ("gemma4_text", "pp", "the gradient of"),  # an input of all layers that requires a gradient
    ],
)
def test_what_a_model_type_cannot_do_is_found(model_type: str, capability: str, why: str) -> None:
    assert why in analyse.refused(config_of(model_type))[capability]


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
