"""What is found in a model by looking at it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
from torch import nn

from hybridtrain.errors import UserError
from hybridtrain.models import known, structure
from hybridtrain.models.structure import structure_of, stub
from tests.families.copies import config_of


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", ("model.embed_tokens", "model.layers", "lm_head", 1.0, None)),
        ("gpt2", ("transformer.wte", "transformer.h", "lm_head", 1.0, None)),
        ("gpt_neox", ("gpt_neox.embed_in", "gpt_neox.layers", "lm_head", 1.0, None)),
        ("gemma2", ("model.embed_tokens", "model.layers", "lm_head", 1.0, 30.0)),
        ("cohere2", ("model.embed_tokens", "model.layers", "lm_head", 0.0625, None)),
        ("granite", ("model.embed_tokens", "model.layers", "lm_head", 0.125, None)),
        ("opt", ("model.decoder.embed_tokens", "model.decoder.layers", "lm_head", 1.0, None)),
    ],
)
def test_where_the_parts_are(model_type: str, expected: tuple[object, ...]) -> None:
    found = structure_of(config_of(model_type))
    assert (found.embed, found.layers, found.head, found.scale, found.cap) == expected
    assert found.before[0] == (found.embed, "BTD")


def test_what_stands_between_is_found() -> None:
    gpt2, bloom = structure_of(config_of("gpt2")), structure_of(config_of("bloom"))
    assert dict(gpt2.before).keys() == {"transformer.wte", "transformer.wpe"}
    assert gpt2.after == ("transformer.ln_f",)
    assert bloom.before[1] == ("transformer.word_embeddings_layernorm", "")
    assert (bloom.returns, bloom.items) == (tuple, 2)
    assert "position_ids" not in bloom.arguments


def test_positions_are_left_to_a_model_that_does_not_count_them_from_zero() -> None:
    bert, roberta = (structure_of(config_of(name, is_decoder=True)) for name in ("bert", "roberta"))
    assert "position_ids" in bert.arguments
    assert "position_ids" not in roberta.arguments


def test_a_stub_has_the_modules_of_its_layer_as_attributes() -> None:
    layer = nn.Sequential(OrderedDict(inner=nn.Linear(2, 2)))
    found = stub(layer, lambda x: x)
    assert found.inner is layer.inner
    assert not list(found.parameters())
    assert found(3) == 3


def test_a_list_of_layers_that_is_not_found_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if GPT-2's config said another number of layers than the model has."""
    config, real = config_of("gpt2"), structure._copy
    expected = structure_of(config)

    def copied(*given: Any) -> Any:
        model = real(*given)
        model.config.n_layer += 1
        return model

    monkeypatch.setattr(structure, "_copy", copied)
    monkeypatch.setattr(structure, "_FOUND", {})
    with pytest.raises(UserError, match="no list of 5 layers was found"):
        structure_of(config)
    monkeypatch.setitem(known.LAYERS, "gpt2", "transformer.h")
    assert structure_of(config) == expected
