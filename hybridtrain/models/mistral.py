"""Mistral: Llama's structure, with one sliding window for all layers where the config has one."""

from __future__ import annotations

import dataclasses
from typing import Any

from hybridtrain.models import llama


def window(config: Any, layer: int) -> int | None:  # noqa: ARG001 - the signature of Family.window
    """Every layer has the config's window, or none has."""
    return config.sliding_window


FAMILY = dataclasses.replace(llama.FAMILY, model_type="mistral", window=window)
