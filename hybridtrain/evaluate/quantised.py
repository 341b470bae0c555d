"""Quantised folders in plain transformers: their weights are computed from their codes when they are loaded.

Left to itself, transformers does so for compressed-tensors in the first forward pass, behind progress bars.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

COMPRESSED_TENSORS = "compressed-tensors"


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars over layers by compressed-tensors, which has no option for that."""
    before = tqdm.__init__

    def init(self: Any, *args: Any, **options: Any) -> None:
        frame = inspect.currentframe()
        caller = frame.f_back.f_globals["__name__"] if frame and frame.f_back else ""
        if caller.startswith("compressed_tensors."):
            options["disable"] = True
        before(self, *args, **options)

    tqdm.__init__ = init
    try:
        yield
    finally:
        tqdm.__init__ = before


def method(model: Any) -> str:
    """How a loaded model was quantised, as its config.json names it; empty: it was not."""
    quantised = getattr(model.config, "quantization_config", None)
    fields = quantised if isinstance(quantised, dict) else quantised.to_dict() if quantised else {}
    return str(fields.get("quant_method", ""))


def dequantise(model: Any) -> None:
    """Compute the weights of a model of a compressed-tensors folder, in place."""
    if (
        method(model) == COMPRESSED_TENSORS
        and model.hf_quantizer.quantization_config.is_quantization_compressed
    ):
        model.hf_quantizer.compressor.decompress_model(model)


def is_dequantised(model: Any) -> bool:
    """Whether `dequantise` did."""
    states = (str(getattr(module, "quantization_status", "")) for module in model.modules())
    return any(state.endswith("DECOMPRESSED") for state in states)
