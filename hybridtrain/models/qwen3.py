"""Qwen3 (dense): Qwen2 without the biases, with an RMSNorm on each query and key head."""

from __future__ import annotations

import dataclasses

from hybridtrain.models import llama, qwen2

FAMILY = dataclasses.replace(
    qwen2.FAMILY,
    model_type="qwen3",
    tp_plan={**llama.TP_PLAN, "self_attn.q_norm": "head_norm", "self_attn.k_norm": "head_norm"},
)
