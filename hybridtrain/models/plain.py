"""Model types whose names and facts follow from config.json alone: Llama and those that differ from it in
biases, norms of heads and windows. All others are analysed (analysis/). No torch.

The names are those of Hugging Face's modules, and of the tensors in its folders.
"""

from __future__ import annotations

from typing import Any

TYPES = ("llama", "mistral", "qwen2", "qwen3")
EMBED, LAYERS, HEAD = "model.embed_tokens", "model.layers", "lm_head"
ROTARY, ATTENTION = "model.rotary_emb", "self_attn"


def window(config: Any, layer: int) -> int | None:
    """The sliding window of a layer in a transformers config; None: full attention."""
    if config.model_type == "llama":
        return None
    kinds = getattr(config, "layer_types", None)
    return config.sliding_window if kinds is None or kinds[layer] == "sliding_attention" else None
