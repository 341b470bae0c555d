"""The linear layers of a model, and which of them choose experts."""

from hybridtrain.models.build import hf_config
from hybridtrain.models.linears import linears_of


def test_a_projection_that_is_as_wide_as_there_are_experts_is_no_router() -> None:
    fields = {
        "model_type": "jetmoe",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "kv_channels": 8,
        "intermediate_size": 32,
        "num_local_experts": 32,
        "num_experts_per_tok": 2,
        "vocab_size": 64,
    }
    linears = linears_of(hf_config(fields, chosen={}, attention="sdpa"))
    assert {linear.outputs for linear in linears} == {32}
    routers = {linear.path.rpartition("layers.")[2] for linear in linears if linear.router}
    parts = ("mlp", "self_attention.experts")
    assert routers == {f"{layer}.{part}.router.layer" for layer in (0, 1) for part in parts}
    assert any(linear.path.endswith("kv_proj") for linear in linears)
