"""What is found in a model by looking at it."""

from __future__ import annotations

import pytest

from hybridtrain.models.structure import structure_of
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
