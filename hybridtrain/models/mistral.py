"""Mistral: Llama's structure, with the same sliding window in all layers if the config has one."""

from __future__ import annotations

import dataclasses
from typing import Any

from hybridtrain.models import llama


def window(config: Any, layer: int) -> int | None:  # noqa: ARG001 - the signature of Family.window
    """All layers have the config's window, which may be None."""
    return config.sliding_window


FAMILY = dataclasses.replace(llama.FAMILY, model_type="mistral", window=window)
