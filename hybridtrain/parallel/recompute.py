"""Activation recomputation and compilation: both wrap a layer's forward, inside the hooks that shard its parameters.

    FSDP hooks ( compile ( recompute ( layer.forward ) ) )

Compilation goes outside: inductor then plans one graph of forward and backward in which what `selective` keeps is marked.
The other way round, selective recomputation sees only the calls of compiled kernels (`mm.out`) and keeps none of them.
Wrapping `forward` instead of the module keeps every parameter name.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from hybridtrain.models.stage import Stage

_SAVED = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_to_all_single.default,
}
"""What `selective` keeps: matrix products, attention, and what ranks have added up or exchanged: the costly part of a layer."""


class _Again:
    """Recomputing that may happen twice: a split backward passes through a layer once for its inputs and once for its weights.

    torch marks what it kept as used up after the first pass and refuses the second; here each pass gets marks of its own.
    """

    def __init__(self, replay: Any):
        self.replay, self.kept = replay, replay.storage

    def __enter__(self) -> Any:
        self.replay.storage = {operation: dict(outputs) for operation, outputs in self.kept.items()}
        return self.replay.__enter__()

    def __exit__(self, *error: Any) -> Any:
        return self.replay.__exit__(*error)


def _contexts(*, split_backward: bool) -> tuple[Any, Any]:
    record, replay = create_selective_checkpoint_contexts(_keep_products)
    return record, _Again(replay) if split_backward else replay


def apply_recompute(stage: Stage, *, kind: str, split_backward: bool) -> None:
    """none: keep all; selective: recompute all but matrix products and attention; full: recompute whole layers.

    `split_backward`: a backward pass may come to a layer twice (not where the layer will be compiled: one graph serves both passes).
    """
    if kind == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # a layer draws no random numbers
    if kind == "selective":
        options["context_fn"] = partial(_contexts, split_backward=split_backward)
    for _, layer in stage.layer_modules():
        layer.forward = partial(checkpoint, layer.forward, **options)


def _keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:  # noqa: ARG001
    return CheckpointPolicy.MUST_SAVE if operation in _SAVED else CheckpointPolicy.PREFER_RECOMPUTE


def apply_compile(stage: Stage, *, backend: str) -> None:
    """Compile each layer by itself: one small graph, compiled once, used by all layers."""
    for _, layer in stage.layer_modules():
        compiled: Any = torch.compile(layer.forward, backend=backend)
        compiled.compiled_from = layer.forward
        layer.forward = compiled


def wrappers(layer: nn.Module) -> list[str]:
    """What is around a layer's own forward, outermost first: of compile and recompute."""
    found: list[str] = []
    forward: Any = layer.forward
    while True:
        if isinstance(forward, partial) and forward.func is checkpoint:
            found.append("recompute")
            forward = forward.args[0]
        elif hasattr(forward, "compiled_from"):
            found.append("compile")
            forward = forward.compiled_from
        else:
            return found
