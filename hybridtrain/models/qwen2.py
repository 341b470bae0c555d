"""Qwen2 and 2.5: Llama's structure with biases on q, k and v; upper layers may have a sliding window."""

from __future__ import annotations

import dataclasses
from typing import Any

from hybridtrain.models import llama


def window(config: Any, layer: int) -> int | None:
    """The config's `layer_types` tell which layers have its window."""
    return config.sliding_window if config.layer_types[layer] == "sliding_attention" else None


FAMILY = dataclasses.replace(llama.FAMILY, model_type="qwen2", window=window)
