"""ZeRO as four manners of one mechanism, torch's fully_shard, which also casts (precision/policy.py).

    stage   parameters in a step          gradients                        optimizer state
    0       whole                         whole, one all-reduce a step     whole        mesh (dp_replicate, 1)
    1       whole after the first use     whole, one reduce-scatter a step sharded
    2       whole after the first use     reduce-scattered per micro-batch sharded
    3       gathered per layer and use    reduce-scattered per micro-batch sharded

ZeRO: arXiv 1910.02054; FSDP: arXiv 2304.11277.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from hybridtrain.models.stage import Stage
from hybridtrain.parallel.mesh import Mesh
from hybridtrain.precision.policy import PrecisionPolicy


def apply_shard(stage: Stage, *, mesh: Mesh, zero_stage: int, precision: PrecisionPolicy) -> None:
    """Wrap layers, embedding and head, then the stage. Gradients come out as means over data ranks: the engine counts them dp times.

    A rank that neither shards nor casts has nothing to wrap for: it would hold every parameter twice and copy every gradient.
    (Under tensor parallelism it does: fully_shard adds up the partial gradients of norms.)
    """
    same_dtype = precision.compute == precision.param == precision.reduce
    if mesh.layout.dp == mesh.layout.tp == 1 and same_dtype:
        return
    options: dict[str, Any] = {"mesh": mesh.data, "mp_policy": precision.fsdp(), "reshard_after_forward": zero_stage == 3}
    for _, layer in stage.layer_modules():
        fully_shard(layer, **options)
    used_last = {**options, "reshard_after_forward": False}  # the backward pass begins with it: gathering it again would only cost time
    for paths in ends(stage):
        fully_shard([stage.part(path) for path in paths], **(used_last if stage.family.head in paths else options))
    fully_shard(stage, **used_last)
    own = _OneShard if mesh.layout.dp_shard == 1 else _AllToAll if mesh.device.type == "cpu" else None
    if own is not None:
        for module in stage.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_reduce_scatter(own())  # type: ignore[arg-type]  # what torch asks for is not public


def ends(stage: Stage) -> list[list[str]]:
    """The modules of a stage beside its layers, in groups: the embedding; final norm and head. A matrix that both share stays with the stage itself."""
    if stage.tied and stage.first and stage.last:
        return []
    return [[stage.family.embed]] * stage.first + [[stage.family.norm, stage.family.head]] * stage.last


def wrapped_modules(stage: Stage) -> set[str]:
    """Names of the modules that `apply_shard` has wrapped; the stage itself is ""."""
    return {name for name, module in stage.named_modules() if isinstance(module, FSDPModule)}


class _AllToAll:
    """Gloo's reduce-scatter takes two to three times as long as an all-to-all of the same bytes and a sum."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(self, *, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any) -> None:
        """Sum, or mean, of every rank's part for this rank, in rank order."""
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        torch.sum(received.view(group.size(), -1), dim=0, out=output_tensor)
        if op == dist.ReduceOp.AVG:
            output_tensor.div_(group.size())
        else:
            assert op == dist.ReduceOp.SUM


class _OneShard:
    """The reduce-scatter of a group of one: its output is its input, in the same memory.

    fully_shard copies the one to the other, which torch leaves out where both are one tensor.
    """

    def __init__(self) -> None:
        self.input: Tensor | None = None

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Called for the input, then for the output."""
        if self.input is None:
            self.input = torch.empty(size, dtype=dtype, device=device)
            return self.input
        output, self.input = self.input, None
        assert (output.shape, output.dtype) == (torch.Size(size), dtype)
        return output


def before_backward(stage: nn.Module, *, zero_stage: int, last: bool) -> None:
    """Set what happens to gradients and parameters at the end of this micro-batch's backward."""
    if not isinstance(stage, FSDPModule):
        return
    stage.set_requires_gradient_sync(last or zero_stage >= 2)
    stage.set_reshard_after_backward(last or zero_stage == 3)
    stage.set_is_last_backward(last or zero_stage >= 2)


def reshard(stage: Stage) -> None:
    """After a forward without backward: drop the whole copies in compute precision, which stand in the place of parameters.

    What reads the stage's parameters next, a checkpoint above all, must find this rank's shards in the dtype of master weights.
    """
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def settle_shards(stage: Stage) -> None:
    """Let fully_shard pad its shards now: it does so at first use, in new memory, and the optimizer's views would go stale."""
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()
