"""Reduced copies keep what makes a model: types of layers, ratios of sizes, sizes that differ."""

from __future__ import annotations

from typing import Any

import pytest

from hybridtrain.models.reduced import HIDDEN, reduced
from tests.families.copies import config_of


def small(model_type: str, **fields: Any) -> Any:
    return reduced(config_of(model_type, **fields), random=False, tp=1)


@pytest.mark.parametrize("dense", [0, 1, 3, 5])
def test_layers_without_experts_come_first_and_one_with_experts_follows(dense: int) -> None:
    copy = small("deepseek_v3", num_hidden_layers=12, first_k_dense_replace=dense)
    assert copy.first_k_dense_replace == dense
    assert copy.num_hidden_layers == max(4, dense + 1)


def test_types_of_layers_that_are_counted_or_listed_by_place_are_in_the_copy() -> None:
    assert set(small("jamba").layers_block_type) == {"mamba", "attention"}
    images = small("mllama", text_config={"cross_attention_layers": [5, 9]}).text_config
    assert (images.num_hidden_layers, images.cross_attention_layers) == (4, [2])  # layers 0, 1, 5 and 6


def test_layers_with_sizes_of_their_own_have_them_in_the_same_ratio() -> None:
    gemma, dots = small("gemma4_text"), small("dots3_note_text")
    full = gemma.layer_types.index("full_attention")
    assert gemma.per_layer_config[full].head_dim == 2 * gemma.per_layer_config[0].head_dim
    window, own = (dots.per_layer_config[kind] for kind in ("indexed_attention", "sliding_attention"))
    assert (window.num_attention_heads, own.num_attention_heads) == (6, 3)
    assert own.qk_nope_head_dim + own.qk_rope_head_dim == dots.head_dim


def test_a_width_other_than_the_hidden_size_remains_another() -> None:
    assert small("electra", embedding_size=128, hidden_size=256).embedding_size < HIDDEN
    assert small("electra", embedding_size=256, hidden_size=256).embedding_size == HIDDEN
    assert small("opt", word_embed_proj_dim=1024, hidden_size=512).word_embed_proj_dim > HIDDEN
