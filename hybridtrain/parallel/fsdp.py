"""All ZeRO stages with torch's fully_shard, which also casts parameters and gradients (precision/policy.py).

    stage   parameters in a step          gradients                          optimizer state
    0       full                          full, one all-reduce per step      full; mesh: (dp_replicate, 1)
    1       full after the first use      full, one reduce-scatter per step  sharded
    2       full after the first use      reduce-scattered per micro-batch   sharded
    3       gathered per layer and use    reduce-scattered per micro-batch   sharded

With engine.offload_parameters, parameters, gradients and optimizer state are in the host's memory; from
there, each layer is gathered as in stage 3, with one data rank, too.

ZeRO: arXiv 1910.02054; FSDP: arXiv 2304.11277.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard

from hybridtrain.models.stage import Stage
from hybridtrain.optim.shards import like, wide
from hybridtrain.parallel.grad_norm import local_part
from hybridtrain.parallel.mesh import Mesh
from hybridtrain.precision.policy import PrecisionPolicy


def apply_shard(
    stage: Stage, *, mesh: Mesh, zero_stage: int, precision: PrecisionPolicy, offload: bool
) -> None:
    """Wrap layers, then the stage with embedding, final norm and head, with fully_shard.

    Gradients become sums over data ranks. Does nothing without sharding, casting and offloading, where
    fully_shard would only copy parameters and gradients. `offload`: keep parameters, gradients and with them
    the optimizer state in the host's memory.
    """
    same_dtype = precision.compute == precision.param == precision.reduce
    if mesh.layout.dp == 1 and same_dtype and not offload:
        return
    options: dict[str, Any] = {
        "mesh": mesh.data,
        "mp_policy": precision.fsdp(),
        "reshard_after_forward": zero_stage == 3,
    }
    if offload:
        # ReducedSums reads gradients in a hook, for which torch 2.11 does not wait if they are pinned
        pinned = mesh.device.type == "cuda" and precision.param == precision.reduce
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=pinned)
    carried = stage.hidden_dtype(precision.compute) == precision.compute  # else layers cast it themselves
    own = dataclasses.replace(precision.fsdp(), cast_forward_inputs=carried)
    for _, layer in stage.layer_modules():
        fully_shard(layer, **{**options, "mp_policy": own})
    # One group: embedding and head in groups of their own are a collective more in each step. The backward
    # pass starts with the head, so gathering it again would only cost time.
    fully_shard(stage, **{**options, "reshard_after_forward": False})
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            _sum_gradients(module, mesh=mesh, offload=offload)


def _sum_gradients(module: FSDPModule, *, mesh: Mesh, offload: bool) -> None:
    """Let the reduction add gradients up, which fully_shard would average."""
    layout = mesh.layout
    # What is copied to the host must not be in the input of the reduction, which is freed before.
    if layout.dp_shard > 1 or offload:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # Gloo has no other reduction with a factor
        if mesh.device.type == "cpu":
            # private protocol
            module.set_custom_reduce_scatter(_AllToAllReduceScatter())  # type: ignore[arg-type]
        return
    module.set_custom_reduce_scatter(_NoReduceScatter())  # type: ignore[arg-type]
    if layout.dp_replicate > 1:
        # In place: with dp_shard 1, fully_shard applies a factor, even of 1.0, by way of a copy.
        module.set_all_reduce_hook(partial(_multiply, factor=layout.dp_replicate))


def _multiply(gradients: Tensor, *, factor: int) -> None:
    gradients.mul_(factor)


def wrapped_modules(stage: Stage) -> set[str]:
    """Names of the modules that `apply_shard` wrapped; the stage itself is ""."""
    return {name for name, module in stage.named_modules() if isinstance(module, FSDPModule)}


class _AllToAllReduceScatter:
    """A reduce-scatter by all-to-all and a local sum: two to three times as fast as Gloo's own."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, *, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any
    ) -> None:
        """The sum over ranks, added in rank order."""
        assert op == dist.ReduceOp.SUM
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        torch.sum(received.view(group.size(), -1), dim=0, out=output_tensor)


class _NoReduceScatter:
    """The reduce-scatter of a group of one rank, without a copy: output and input are the same memory."""

    def __init__(self) -> None:
        self.input: Tensor | None = None

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Called first for the input, then for the output."""
        if self.input is None:
            self.input = torch.empty(size, dtype=dtype, device=device)
            return self.input
        output, self.input = self.input, None
        assert (output.shape, output.dtype) == (torch.Size(size), dtype)
        return output


def before_backward(stage: nn.Module, *, zero_stage: int, last: bool) -> None:
    """Set whether this micro-batch's backward pass reduces gradients and reshards parameters."""
    if not isinstance(stage, FSDPModule):
        return
    stage.set_requires_gradient_sync(last or zero_stage >= 2)
    stage.set_reshard_after_backward(last or zero_stage == 3)
    stage.set_is_last_backward(last or zero_stage >= 2)


class ReducedSums:
    """Gradients of micro-batches, added up in fp32 where each is reduced (ZeRO 2 and 3) and the parameters
    have fewer bits: fully_shard would add them in the dtype of the parameters.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.of: dict[nn.Parameter, Tensor] = {}
        """Parameter -> this rank's part of the sum."""
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._add)

    def _add(self, parameter: Any) -> None:
        """Called by fully_shard after a reduction."""
        gradient, parameter.grad = local_part(parameter.grad), None
        if parameter in self.of:
            self.of[parameter] += gradient
        else:
            self.of[parameter] = wide(gradient)

    def finish(self) -> None:
        """Give each parameter its sum as the gradient. Called after the last backward pass of a step."""
        for parameter, total in self.of.items():
            parameter.grad = like(total.to(parameter.dtype), parameter, shape=parameter.shape)
        self.of.clear()


def reshard(stage: Stage) -> None:
    """Free the gathered parameters after a forward pass without backward.

    Afterwards `stage.parameters()` returns this rank's shards in the dtype of the master weights,
    e.g. for a checkpoint.
    """
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def groups_of(states: Iterable[Any]) -> list[Any]:
    """The groups of parameters of fully_shard's states."""
    groups: list[Any] = []
    for state in states:
        of_state = getattr(state, "_fsdp_param_groups", None)
        groups += of_state if of_state is not None else [state._fsdp_param_group]  # torch 2.11
    return [group for group in groups if group is not None]


def pad_shards(stage: Stage) -> None:
    """Make fully_shard pad its shards now.

    At the first use, it would move them, and the optimizer's views would be stale. Nothing is gathered: of a
    model of 1.9 GiB on 4 ranks, that took 22 s and left 1.8 GiB more on each.
    """
    wrapped = (module for module in stage.modules() if isinstance(module, FSDPModule))
    for group in groups_of(map(fully_shard.state, wrapped)):  # type: ignore[attr-defined]
        group.lazy_init()
