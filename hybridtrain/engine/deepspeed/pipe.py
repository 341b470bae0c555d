"""Our stages in DeepSpeed's pipeline: each pipeline rank has one PipelineModule of one layer, which is its whole Stage.

Only hidden states travel. Every rank of a pipeline has the micro-batches anyway, and both of DeepSpeed's schedules run them
forward in order, so that a stage takes labels and positions from its own list.
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
    """The one layer: hands each micro-batch to the stage, and keeps the loss sums."""

    def __init__(self, stage: Stage):
        super().__init__()
        self.stage = stage
        self.batches: Iterator[Batch] = iter(())
        self.factor = torch.ones(())
        self.losses: list[Tensor] = []

    def begin(self, batches: Sequence[Batch], *, factor: Tensor) -> None:
        """What the next forward passes are for. The last stage's output is its sums x `factor`, added up."""
        self.batches, self.factor, self.losses = iter(batches), factor, []

    def forward(self, x: Tensor) -> Tensor:
        batch = next(self.batches)
        out = self.stage(x, batch=batch)
        if not self.stage.last:
            return out
        self.losses.append(out.detach())
        return (out * self.factor).sum()


class Pipeline(PipelineModule):
    """PipelineModule over our stages, which ties embedding and head of the two ends by itself."""

    def __init__(self, layer: StageLayer, *, layout: ParallelLayout, ends: dist.ProcessGroup | None, tied: nn.Parameter | None):
        super().__init__([layer] * layout.pp, topology=topology(layout), loss_fn=None, partition_method="uniform")
        self.ends = ends
        self.tied = [tied]  # in a list: nn.Module would register it a second time
        if tied is not None:
            tied.ds_pipe_replicated = not layer.stage.first  # type: ignore[attr-defined]  # the last stage's copy is not counted in norms

    def get_tied_weights_and_groups(self) -> list[Any]:
        """Called once a step, before gradients are reduced over data ranks. DeepSpeed adds up `grad`; its optimizers keep it in three places."""
        weight = self.tied[0]
        if weight is not None:
            places = (getattr(weight, name, None) for name in ("grad_accum", "_hp_grad", "grad"))
            gradient = next(place for place in places if place is not None)
            dist.all_reduce(gradient, group=self.ends)
        return []


def topology(layout: ParallelLayout) -> PipeModelDataParallelTopology:
    """The layout in DeepSpeed's terms; the order of ranks is the same: tp fastest, pp slowest."""
    return PipeModelDataParallelTopology(num_pp=layout.pp, num_mp=layout.tp, num_dp=layout.dp)
