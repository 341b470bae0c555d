"""Llama 2 and 3: full attention, optional biases, optionally tied embeddings."""

from __future__ import annotations

from typing import Any

from hybridtrain.models.family import Family

TP_PLAN = {
    "input_layernorm": "norm",
    "post_attention_layernorm": "norm",
    "self_attn": "attention_input",
    "self_attn.q_proj": "colwise",
    "self_attn.k_proj": "colwise",
    "self_attn.v_proj": "colwise",
    "self_attn.o_proj": "rowwise",
    "mlp": "mlp_input",
    "mlp.gate_proj": "colwise",
    "mlp.up_proj": "colwise",
    "mlp.down_proj": "rowwise",
}


def full_attention(config: Any, layer: int) -> int | None:  # noqa: ARG001 - the signature of Family.window
    """No layer has a sliding window."""
    return None


def normal_matrices(config: Any, name: str) -> float | None:
    """Matrices and embeddings have standard deviation initializer_range, norms are one, biases
    zero (as in transformers).
    """
    return None if name.endswith(".bias") or "norm" in name else config.initializer_range


FAMILY = Family(
    model_type="llama",
    embed="model.embed_tokens",
    layers="model.layers",
    norm="model.norm",
    head="lm_head",
    rotary="model.rotary_emb",
    window=full_attention,
    tp_plan=TP_PLAN,
    kv_projections=("self_attn.k_proj", "self_attn.v_proj"),
    attention="self_attn",
    initial=normal_matrices,
)
