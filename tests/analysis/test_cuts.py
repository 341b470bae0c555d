"""Where models can be cut, at their own numbers of layers."""

from __future__ import annotations

from typing import Any

import pytest

from hybridtrain.analysis import analyse, cuts
from tests.families.copies import config_of

KINDS = [("sliding_attention", "full_attention")[index % 2] for index in range(8)]


@pytest.mark.parametrize(
    ("model_type", "fields", "expected"),
    [
        # the last two layers use keys and values of layers 4 and 5
        (
            "gemma3n_text",
            {"num_hidden_layers": 8, "num_kv_shared_layers": 2, "layer_types": KINDS}
            | {"intermediate_size": 80, "activation_sparsity_pattern": None},
            (1, 2, 3, 4),
        ),
        # layers from the sixth on use the hidden states at the fifth, which a reduced copy of four lacks
        (
            "inkling2_text",
            {"num_hidden_layers": 8, "layer_types": ["hybrid_sliding"] * 8, "n_layers_per_attn_res_block": 5},
            (1, 2, 3, 4, 5),
        ),
        ("zaya", {}, ()),
        ("gemma4_text", {"num_hidden_layers": 6, "layer_types": KINDS[:6]}, None),
    ],
)
def test_stages_begin_at_layers_that_take_hidden_states_alone(
    model_type: str, fields: dict[str, Any], expected: tuple[int, ...] | None
) -> None:
    config = config_of(model_type, **fields)
    assert cuts.allowed(config, holds=False) == expected


def test_of_layers_that_take_nothing_else_the_reduced_copy_is_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analyse, "comparison", lambda copy: pytest.fail(f"examined: {copy}"))
    assert cuts.allowed(config_of("gemma2"), holds=True) is None
    with pytest.raises(pytest.fail.Exception):
        cuts.allowed(config_of("gemma4_text", num_hidden_layers=6, layer_types=KINDS[:6]), holds=True)
