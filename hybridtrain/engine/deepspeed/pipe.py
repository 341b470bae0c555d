"""Our stages in DeepSpeed's pipeline: the PipelineModule of each pipeline rank has one layer,
which is its Stage.

Only hidden states are sent. Every rank of a pipeline has the micro-batches, and both of DeepSpeed's schedules
run their forward passes in order, so that a stage takes labels and positions from its own list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from hybridtrain.models.stage import Stage
from hybridtrain.plan.layout import ParallelLayout
from hybridtrain.types import Batch


class StageLayer(nn.Module):
    """The only layer: calls the stage with each micro-batch, and stores the loss sums."""

    def __init__(self, stage: Stage):
        super().__init__()
        self.stage = stage
        self.batches: Iterator[Batch] = iter(())
        self.factor = torch.ones(())
        self.losses: list[Tensor] = []

    def begin(self, batches: Sequence[Batch], *, factor: Tensor) -> None:
        """Set the micro-batches of the next forward passes.

        The last stage's output is the sum of its sums x `factor`.
        """
        self.batches, self.factor, self.losses = iter(batches), factor, []

    def forward(self, x: Tensor) -> Tensor:
        batch = next(self.batches)
        out = self.stage(x, batch=batch)
        if not self.stage.last:
            return out
        self.losses.append(out.detach())
        return (out * self.factor).sum()


class TiedPipelineModule(PipelineModule):
    """A PipelineModule of our stages, which sums the gradients of a tied embedding and head itself."""

    def __init__(
        self,
        layer: StageLayer,
        *,
        layout: ParallelLayout,
        embedding_group: dist.ProcessGroup | None,
        tied: nn.Parameter | None,
    ):
        super().__init__(
            [layer] * layout.pp, topology=topology(layout), loss_fn=None, partition_method="uniform"
        )
        self.embedding_group = embedding_group
        self.tied = [tied]  # in a list, so that nn.Module does not register it again
        if tied is not None:
            # The last stage's copy does not count in norms.
            tied.ds_pipe_replicated = not layer.stage.first  # type: ignore[attr-defined]

    def get_tied_weights_and_groups(self) -> list[Any]:
        """Called once per step, before gradients are reduced over data ranks.

        Sums the gradients of the tied weights. DeepSpeed's own code sums `grad`, but its optimizers may store
        the gradient in two other attributes.
        """
        weight = self.tied[0]
        if weight is not None:
            attributes = (getattr(weight, name, None) for name in ("grad_accum", "_hp_grad", "grad"))
            gradient = next(attribute for attribute in attributes if attribute is not None)
            dist.all_reduce(gradient, group=self.embedding_group)
        return []


def topology(layout: ParallelLayout) -> PipeModelDataParallelTopology:
    """The layout as DeepSpeed's topology. The order of ranks is the same: tp fastest, pp slowest."""
    return PipeModelDataParallelTopology(num_pp=layout.pp, num_mp=layout.tp, num_dp=layout.dp)
