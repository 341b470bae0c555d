"""Activation recomputation and compilation. Both wrap a layer's forward, inside the hooks of FSDP.

    FSDP hooks ( compile ( recompute ( layer.forward ) ) )

Compilation is outside, so that inductor sees which results `selective` keeps. The other way round, selective
recomputation sees only calls of compiled kernels (`mm.out`), and keeps none of their results.
Wrapping `forward` instead of the module preserves the parameter names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from hybridtrain.models.dropout import Recomputation, Slot
from hybridtrain.models.slicing import Local
from hybridtrain.models.stage import Stage
from hybridtrain.precision.double import InDouble

_SAVED = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_to_all_single.default,
}
"""Operations whose results `selective` keeps, because recomputing them is expensive:
matrix products, attention, collectives."""


class _RepeatableReplay:
    """Allows recomputing twice: a split backward pass goes through a layer once for inputs
    and once for weights.

    torch empties its storage in the first pass, and fails in the second; here each pass gets a
    copy of the storage.
    """

    def __init__(self, replay: Any):
        self.replay, self.kept = replay, replay.storage

    def __enter__(self) -> Any:
        self.replay.storage = {operation: dict(outputs) for operation, outputs in self.kept.items()}
        return self.replay.__enter__()

    def __exit__(self, *error: Any) -> Any:
        return self.replay.__exit__(*error)


class _Both:
    """Two contexts, one in the other. Can be entered several times if they can."""

    def __init__(self, outer: Any, inner: Any):
        self.outer, self.inner = outer, inner

    def __enter__(self) -> None:
        self.outer.__enter__()
        self.inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.inner.__exit__(*error)
        self.outer.__exit__(*error)


def _contexts(*, selective: bool, split_backward: bool, slot: Slot | None) -> tuple[Any, Any]:
    """Those of a layer's forward pass, in which this is called, and of its recomputation. `slot`: of its
    dropout, if it has any.
    """
    pair: tuple[Any, Any] = contextlib.nullcontext(), contextlib.nullcontext()
    record, replay = create_selective_checkpoint_contexts(_keep_products) if selective else pair
    replay = _RepeatableReplay(replay) if selective and split_backward else replay
    return record, replay if slot is None else _Both(Recomputation(slot), replay)


def apply_recompute(stage: Stage, *, kind: str, split_backward: bool, compiled: bool) -> None:
    """none: keep all activations; selective: recompute all but the results of _SAVED;
    full: recompute whole layers.

    `split_backward`: the backward pass may go through a layer twice; not with compilation, where
    one graph does both. `compiled`: inside compiled code, whose graph has the rows of dropout as its inputs.
    """
    if kind == "none":
        return
    # Layers use no random numbers (models/dropout.py), so the RNG state need not be saved.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    for index, layer in stage.layer_modules():
        slot = None if compiled else stage.dropouts.of_layer(index)
        if kind == "selective" or slot is not None:
            options["context_fn"] = partial(
                _contexts, selective=kind == "selective", split_backward=split_backward, slot=slot
            )
        layer.forward = partial(checkpoint, layer.forward, **options)


def _keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:  # noqa: ARG001
    return CheckpointPolicy.MUST_SAVE if operation in _SAVED else CheckpointPolicy.PREFER_RECOMPUTE


def apply_compile(stage: Stage, *, backend: str) -> None:
    """Compile each layer separately: one small graph, compiled once and used by all layers.

    A recomputed layer with dropout must be one graph: in one of several, recomputation would take the
    rows of another micro-batch.
    """
    for index, layer in stage.layer_modules():
        whole = "recompute" in wrappers(layer) and stage.dropouts.of_layer(index) is not None
        if whole:  # OfAttention, which is left again
            settings: Any = torch._dynamo.config
            settings.skip_fwd_side_effects_in_bwd_under_checkpoint = True
        compiled: Any = torch.compile(layer.forward, backend=backend, fullgraph=whole)
        compiled.compiled_from = layer.forward
        layer.forward = compiled


def allow_graphs(count: int) -> None:
    """Let layers, which share their code, be compiled in as many ways: each combination of formats is one."""
    settings: Any = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, count)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, count)


@contextlib.contextmanager
def uncompiled(stage: Stage) -> Iterator[None]:
    """The stage with its layers as they were before `apply_compile`, meanwhile; other wrappers stay."""
    compiled = [(layer, layer.forward) for _, layer in stage.layer_modules() if "compile" in wrappers(layer)]
    for layer, forward in compiled:
        layer.forward = _uncompiled(forward)
    try:
        yield
    finally:
        for layer, forward in compiled:
            layer.forward = forward


def _uncompiled(forward: Any) -> Any:
    if isinstance(forward, partial) and forward.func is checkpoint:
        return partial(checkpoint, _uncompiled(forward.args[0]), **forward.keywords)
    if isinstance(forward, Local):
        return Local(_uncompiled(forward.forward), forward.slots)
    return getattr(forward, "compiled_from", forward)


def wrappers(layer: nn.Module) -> list[str]:
    """The wrappers around a module's forward, outermost first: "compile", "recompute", "local", "double"."""
    result: list[str] = []
    forward: Any = layer.forward
    while True:
        if isinstance(forward, partial) and forward.func is checkpoint:
            result.append("recompute")
            forward = forward.args[0]
        elif isinstance(forward, InDouble):
            result.append("double")
            forward = forward.forward
        elif isinstance(forward, Local):
            result.append("local")
            forward = forward.forward
        elif hasattr(forward, "compiled_from"):
            result.append("compile")
            forward = forward.compiled_from
        else:
            return result
