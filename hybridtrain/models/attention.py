"""Attention of packed rows, in every model that takes its masks from transformers: documents do not attend to
each other, whatever else a layer's kind of attention allows.

    model's own forward -> create_causal_mask, create_sliding_window_causal_mask, ... -> _mask

transformers hands over each kind of attention as a function of (row, head, query, key). A mask function of
our own adds the documents; it is registered under names of its own, so that models of other code in this
process are not changed.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from hybridtrain.models import dropout
from hybridtrain.models.build import attention_of, model_class
from hybridtrain.types import Batch

_KEYED = "hybridtrain_keyed"
_NAMES = {"sdpa": "hybridtrain_sdpa", "eager": "hybridtrain_eager"}
_documents: ContextVar[tuple[Tensor, Tensor] | None] = ContextVar("documents", default=None)
"""Of the micro-batch in a model's forward: number of each position's document, and its place there, (B, T);
None: a row is one document."""


def registered(config: Any) -> str:
    """The name of the attention implementation that a model uses, sdpa or eager, with our masks."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    implementation = attention_of(config)
    if implementation in (*_NAMES.values(), _KEYED):
        return implementation
    name = _NAMES[implementation]
    if name not in ALL_ATTENTION_FUNCTIONS:
        function = ALL_ATTENTION_FUNCTIONS["sdpa"] if implementation == "sdpa" else _eager
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, _sdpa_mask if implementation == "sdpa" else _eager_mask)
    for variable, classes in vars(sys.modules[model_class(config).__module__]).items():
        if variable.endswith("ATTENTION_CLASSES"):  # models of the older kind: a class for each name
            classes.setdefault(name, classes[implementation])
    return name


def use_keyed(model: Any) -> None:
    """Let a model of transformers that uses eager attention drop attention weights by their sites
    (dropout.py), with transformers' own masks.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    if model.config._attn_implementation == "eager":
        AttentionInterface.register(_KEYED, _eager)
        AttentionMaskInterface.register(_KEYED, eager_mask)
        model.config._attn_implementation = _KEYED


@contextlib.contextmanager
def observed(config: Any, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Models called inside use the attention function that `wrap` makes of theirs; those that have no such
    function are not affected.
    """
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = registered(config)
    function = ALL_ATTENTION_FUNCTIONS[name]
    AttentionInterface.register(name, wrap(function))
    try:
        yield
    finally:
        AttentionInterface.register(name, function)


@contextlib.contextmanager
def documents_of(batch: Batch) -> Iterator[None]:
    """Models called inside keep the documents of `batch` apart."""
    positions_BT = batch.position_ids_BT
    token = _documents.set(((positions_BT == 0).cumsum(1), positions_BT) if batch.packed else None)
    try:
        yield
    finally:
        _documents.reset(token)


def _sdpa_mask(**given: Any) -> Tensor | None:
    """None for full causal attention of one document, else bool, (B, 1, T, T)."""
    from transformers.masking_utils import sdpa_mask

    length, window = given["kv_length"], given.get("local_size")
    whole = window is None or window >= length
    if given.get("allow_is_causal_skip", True) and whole and _documents.get() is None:
        return None
    return sdpa_mask(**_with_documents(given))


def _eager_mask(**given: Any) -> Tensor:
    """The mask to add to attention scores, (B, 1, T, T)."""
    from transformers.masking_utils import eager_mask

    return eager_mask(**_with_documents(given))


def _with_documents(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a mask function, with documents, and for whole rows: under sequence parallelism the
    hidden states from which transformers takes the number of queries are a part of them.
    """
    documents = _documents.get()
    changed = {"attention_mask": None, "q_length": given["kv_length"], "allow_is_causal_skip": False}
    if documents is not None:
        document_BT, position_BT = documents

        def within(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            allowed = given["mask_function"](row, head, position_BT[row, query], position_BT[row, key])
            return allowed & (document_BT[row, query] == document_BT[row, key])

        changed["mask_function"] = within
        changed["allow_is_bidirectional_skip"] = False
    return {**given, **changed}


def _eager(module: nn.Module, *given: Any, **options: Any) -> Any:
    """The eager attention of the file that defines the module's class, with dropout of its site."""
    site = dropout.site_of(module) if options.get("dropout") else None
    for kind in type(module).__mro__:
        function = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if function is not None:
            with contextlib.nullcontext() if site is None else dropout.OfAttention(site):
                return function(module, *given, **options)
    raise AssertionError(f"{type(module).__module__} has no eager attention")
