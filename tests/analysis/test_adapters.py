"""Linear layers that a model does not call get no adapters."""

import pytest

from hybridtrain.analysis.adapters import sizes
from hybridtrain.config.schema import Config
from hybridtrain.errors import UserError
from tests.families.copies import own_fields_of


def config(model_type: str, *match: str) -> Config:
    result = Config()
    result.model.config = own_fields_of(model_type)
    result.adapters.kind, result.adapters.rank, result.adapters.match = "lora", 4, list(match)
    return result


def test_a_layer_whose_weight_is_read_without_a_call_is_refused_with_those_that_are_called():
    """Mamba adds dt_proj's bias itself, later."""
    with pytest.raises(UserError, match=r"mixer.dt_proj without calling(?s:.*)'\*.mixer.in_proj'"):
        sizes(config("mamba"))
    with pytest.raises(UserError, match=r"\['backbone.layers.\*.mixer.dt_proj'\]"):
        sizes(config("mamba", "*.dt_proj"))
    named = config("mamba", "*.in_proj", "*.out_proj")
    inner, hidden = named.model.config["intermediate_size"], named.model.config["hidden_size"]
    of_layer = 4 * (hidden + 2 * inner) + 4 * (inner + hidden)
    assert set(sizes(named).adapters) == {of_layer}


def test_dropout_needs_rows_and_positions():
    """OPT's MLP is given all tokens in one dimension."""
    fields = config("opt")
    fields.adapters.dropout = 0.1
    with pytest.raises(
        UserError, match=r"fc1 without rows(?s:.*)dropout=0, or adapters.match=\['\*.self_attn"
    ):
        sizes(fields)
    fields.adapters.match = ["*.q_proj"]
    assert min(sizes(fields).adapters) > 0


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "mixtral", "gpt_oss", "deepseek_v3", "bloom"])
def test_all_linear_layers_of_common_models_are_called(model_type):
    assert min(sizes(config(model_type)).adapters) > 0
