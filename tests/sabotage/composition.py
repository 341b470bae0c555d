"""Faults of parallel composition that were reported of other systems, planted in ours: each trains,
converges, and is wrong.

Every function has the signature of `parity.measure.train_layout`, runs on each rank, plants its fault there
and trains. The reports: NVIDIA/Megatron-LM#7452 (findings 1, 3, 8, 11), ROCm/TransformerEngine#715,
pytorch/pytorch#190746, bigcode-project/Megatron-LM#35.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from hybridtrain.engine import torch_native
from hybridtrain.models.dropout import Dropouts, Recomputation
from hybridtrain.parity.measure import LayoutJob, Measurement, train_layout
from hybridtrain.tasks import linear_cross_entropy as loss


def _over_tp(grad: Any) -> bool:
    names = grad.device_mesh.mesh_dim_names or ()
    return any(
        name == "tp" and not placement.is_replicate()
        for name, placement in zip(names, grad.placements, strict=True)
    )


def softmax_over_the_local_vocabulary(job: LayoutJob, reference_norm: float) -> Measurement:
    """Each tp rank normalises over its rows of the vocabulary as if they were all."""
    whole = loss._log_probabilities
    # the other ranks are what is forgotten
    loss._log_probabilities = lambda logits, *, ranks: whole(logits, ranks=None)  # noqa: ARG005
    return train_layout(job, reference_norm)


def local_token_counts(job: LayoutJob, reference_norm: float) -> Measurement:
    """Each data rank divides by its own targets; they differ from rank to rank."""
    count = torch_native.global_counts

    def own(batches: Any, *, task: Any, mesh: Any, flags: Any) -> Any:
        # of an even share: what uneven rows would give
        shares = torch.tensor([0.75, 1.25], device=mesh.device)
        return (count(batches, task=task, mesh=mesh, flags=flags) * shares[mesh.dp_rank % 2]).long()

    torch_native.global_counts = own
    return train_layout(job, reference_norm)


def a_sliced_parameter_counted_on_one_rank(job: LayoutJob, reference_norm: float) -> Measurement:
    """Of one kind of parameter that is sliced over tp, only the first rank's slices
    enter the gradient norm."""
    norm = torch_native.gradient_norm

    def without(parameters: Any, *, mesh: Any, dtype: Any) -> Any:
        sliced = sorted(
            {tuple(p.shape) for p in parameters if isinstance(p.grad, DTensor) and _over_tp(p.grad)}
        )
        dropped = sliced[0] if mesh.coordinates["tp"] else None
        return norm([p for p in parameters if tuple(p.shape) != dropped], mesh=mesh, dtype=dtype)

    torch_native.gradient_norm = without
    return train_layout(job, reference_norm)


def replicated_parameters_counted_on_every_rank(job: LayoutJob, reference_norm: float) -> Measurement:
    """Norm weights, whole on every tp rank, enter the gradient norm once for each."""
    norm = torch_native.gradient_norm

    def twice(parameters: Any, *, mesh: Any, dtype: Any) -> Any:
        whole = [p for p in parameters if p.grad is not None and not _over_tp(p.grad)]
        again = norm(whole, mesh=mesh, dtype=dtype).square() * (mesh.layout.tp - 1)
        return (norm(parameters, mesh=mesh, dtype=dtype).square() + again).sqrt()

    torch_native.gradient_norm = twice
    return train_layout(job, reference_norm)


def partial_gradients_of_a_replicated_norm(job: LayoutJob, reference_norm: float) -> Measurement:
    """Norms of query and key heads are whole on every tp rank, their gradients the sum over a rank's own
    heads, and not added up."""
    _forget_partial("self_attn.q_norm.weight", "self_attn.k_norm.weight")
    return train_layout(job, reference_norm)


def _forget_partial(*endings: str) -> None:
    """Gradients of parameters with these names are not added over tp ranks."""
    add = torch_native.add_partial_gradients

    def without(stages: Any, *, group: Any) -> None:
        for stage in stages:
            stage.partial = {name for name in stage.partial if not name.endswith(endings)}
        add(stages, group=group)

    torch_native.add_partial_gradients = without


def identity_gradient_of_log_softmax(job: LayoutJob, reference_norm: float) -> Measurement:
    """The loss is right; its gradient lacks the softmax."""
    torch.Tensor.exp_ = lambda self: self.zero_()  # type: ignore[method-assign]
    return train_layout(job, reference_norm)


def repeated_heads_not_reduced(job: LayoutJob, reference_norm: float) -> Measurement:
    """A key/value head that several tp ranks use gets the gradient of one of them."""
    _forget_partial("self_attn.k_proj.weight", "self_attn.v_proj.weight")
    return train_layout(job, reference_norm)


def dropout_of_the_rows_in_the_forward_pass(job: LayoutJob, reference_norm: float) -> Measurement:
    """A layer is recomputed with the dropout of the micro-batch that its stage has computed last."""
    Recomputation.__enter__ = lambda self: None  # type: ignore[method-assign]  # noqa: ARG005
    Recomputation.__exit__ = lambda self, *error: None  # type: ignore[method-assign]  # noqa: ARG005
    Dropouts.of = rows_stay(Dropouts.of)  # type: ignore[method-assign]
    return train_layout(job, reference_norm)


def rows_stay(of: Any) -> Any:
    """Dropouts.of, after which the rows of the forward pass are still there."""

    @contextmanager
    def forgetful(self: Dropouts, *given: Any, **options: Any) -> Iterator[None]:
        try:
            with of(self, *given, **options):
                kept = [slot.rows for slot in self.slots]
                yield
        finally:
            for slot, rows in zip(self.slots, kept, strict=True):
                slot.rows = rows

    return forgetful


def tied_gradients_not_added(job: LayoutJob, reference_norm: float) -> Measurement:
    """Embedding and head are one matrix on two pipeline stages, and each keeps its own gradient."""
    torch_native.add_shared_gradients = lambda shared: None  # noqa: ARG005
    return train_layout(job, reference_norm)
