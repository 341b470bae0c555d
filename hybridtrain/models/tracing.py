"""Calls of a reduced copy of a model, and hooks that watch them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hybridtrain.models.build import logits_of

ROWS, POSITIONS = 3, 7
"""Size of the batch of a trace. Sizes of the model's own, such as four streams of hidden states, should
differ from them.
"""


def arguments(model: Any) -> tuple[str, ...]:
    """Those of position_ids, attention_mask and use_cache that the model's forward has."""
    taken = inspect.signature(model.forward).parameters
    return tuple(name for name in ("position_ids", "attention_mask", "use_cache") if name in taken)


@contextmanager
def hooked(*handles: Any) -> Iterator[None]:
    """Removes hooks at the end of the `with` block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def call(model: Any, **more: Tensor) -> Any:
    """What the model returns for ROWS rows of POSITIONS tokens."""
    ids = torch.arange(ROWS * POSITIONS).view(ROWS, POSITIONS) % model.get_input_embeddings().weight.shape[0]
    given = {"attention_mask": torch.ones_like(ids), "use_cache": False}
    given = {name: given[name] for name in arguments(model) if name in given}
    return model(input_ids=ids, **given, **more)


def logits(model: Any, **more: Tensor) -> Tensor:
    """Its logits of tokens."""
    return logits_of(call(model, **more))
