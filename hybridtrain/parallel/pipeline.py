"""Pipeline stages and schedules, on torch.distributed.pipelining. A schedule is one row in `_SCHEDULES`.

Stages of rank r: r, r + pp, ... with looped schedules; r and 2 pp - 1 - r with V schedules.
GPipe: arXiv 1811.06965; 1F1B and interleaving: arXiv 2104.04473; zero bubble and ZBV: arXiv 2401.10241;
DualPipeV: DeepSeek-V3, arXiv 2412.19437.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage, schedules

from hybridtrain.models.stage import Stage
from hybridtrain.parallel.fsdp import before_backward, groups_of
from hybridtrain.plan.schedules import SINGLE
from hybridtrain.types import Batch

_SCHEDULES: dict[str, type] = {
    "gpipe": schedules.ScheduleGPipe,
    "1f1b": schedules.Schedule1F1B,
    "interleaved_1f1b": schedules.ScheduleInterleaved1F1B,
    "looped_bfs": schedules.ScheduleLoopedBFS,
    "interleaved_zero_bubble": schedules.ScheduleInterleavedZeroBubble,
    "zbv_zero_bubble": schedules.ScheduleZBVZeroBubble,
    "dualpipev": schedules.ScheduleDualPipeV,
}

_FORWARD = {schedules.FORWARD, schedules.SEND_F, schedules.RECV_F, schedules.UNSHARD, schedules.RESHARD}


class ZeroStage(PipelineStage):
    """A PipelineStage that supports ZeRO 2 and 3, and accumulates gradients in the reduce dtype.

    torch's own reduces gradients and reshards after the last micro-batch, as ZeRO 0 and 1 need; 2
    and 3 reduce after every micro-batch. After a split backward pass, torch's own leaves gradients
    in the compute dtype.
    """

    zero_stage: int
    batches: Sequence[Batch]
    """The micro-batches of the step. Every rank of a pipeline has them; only hidden states are sent."""

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self.batch = self.batches[fwd_chunk_id]
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward_maybe_with_nosync(*args, **kwargs, batch=self.batch)

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict, last_backward: bool = False
    ) -> Any:
        stage = self.submod
        if not isinstance(stage, FSDPModule):
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        if backward_type == "full" and self.zero_stage >= 2:
            before_backward(stage, zero_stage=self.zero_stage, last=False)
            _backward(bwd_kwargs["stage_output"], bwd_kwargs["output_grads"])
            inputs = bwd_kwargs["input_values"]
            return tuple(_take_gradient(value) for value in inputs), None
        result = super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        if backward_type != "input":
            for group in _parameter_groups(stage):
                for parameter in group.fsdp_params:
                    if hasattr(parameter, "_unsharded_param"):
                        parameter.accumulate_unsharded_grad_if_needed()
                        parameter.to_accumulated_grad_if_needed()
        return result


def _backward(outputs: Any, grads: Any) -> None:
    """Backward from a stage's outputs that require gradients; none do if all parameters are frozen."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [
        (output, grad)
        for output, grad in zip(outputs, grads or [None] * len(outputs), strict=True)
        if output.requires_grad
    ]
    if pairs:
        torch.autograd.backward([output for output, _ in pairs], [grad for _, grad in pairs])


def _take_gradient(value: Any) -> Tensor | None:
    if not isinstance(value, Tensor):
        return None
    grad, value.grad = value.grad, None
    return grad


def _forward_only(actions: list[Any]) -> list[Any]:
    """A rank's actions without those of the backward pass.

    `eval` of torch 2.13 runs the backward pass too, which fails if neighboring stages are on one rank.
    """
    flat = [part for action in actions for part in (action.sub_actions or (action,))]
    return [action for action in flat if action.computation_type in _FORWARD]


def _parameter_groups(stage: FSDPModule) -> list[Any]:
    return groups_of(fully_shard.state(stage)._state_ctx.all_states)  # type: ignore[attr-defined]


class Pipeline:
    """The stages of this rank with a schedule: a call runs the forward and backward
    passes of all micro-batches.
    """

    def __init__(
        self,
        stages: list[Stage],
        *,
        ids: list[int],
        count: int,
        schedule: str,
        micro_batches: int,
        group: dist.ProcessGroup,
        **shape: Any,
    ):
        """`shape`: see _wrap. A pipeline is for a fixed number and shape of micro-batches."""
        self.stages = stages
        self.factor: Tensor | None = None
        self.sums: list[Tensor] = []
        self.wrapped = [
            self._wrap(stage, index, count=count, group=group, **shape)
            for stage, index in zip(stages, ids, strict=True)
        ]
        options = {"n_microbatches": micro_batches, "loss_fn": self._loss, "scale_grads": False}
        self.schedule = _SCHEDULES[schedule](
            self.wrapped[0] if schedule in SINGLE else self.wrapped, **options
        )
        self.order = None if schedule in SINGLE else self.schedule.pipeline_order_with_comms

    def _wrap(
        self,
        stage: Stage,
        index: int,
        *,
        count: int,
        group: dist.ProcessGroup,
        zero_stage: int,
        device: torch.device,
        dtype: torch.dtype,
        rows: int,
        length: int,
        positions: int,
        sums: int,
    ) -> ZeroStage:
        """A stage for micro-batches of `rows` x `length` tokens and hidden states of `positions` of them.

        Passes the shapes to torch, which would otherwise run a forward and backward pass to find them.
        """
        shape = stage.hidden_shape(rows=rows, positions=positions)
        carried = stage.hidden_dtype(dtype)
        hidden = torch.empty(shape, dtype=carried, device="meta", requires_grad=True)
        ids = torch.empty(rows, length, dtype=torch.int64, device="meta")
        wide = torch.promote_types(torch.float32, dtype)
        loss = torch.empty(sums, dtype=wide, device="meta", requires_grad=True)
        wrapped = ZeroStage(
            stage,
            index,
            count,
            device,
            input_args=(ids if stage.first else hidden,),
            output_args=(loss if stage.last else hidden,),
            group=group,
        )
        wrapped.zero_stage = zero_stage
        return wrapped

    def _loss(self, sums: Tensor, target: Tensor) -> Tensor:  # noqa: ARG002 - the stage has computed the loss
        self.sums.append(sums.detach())
        return sums if self.factor is None else (sums * self.factor).sum()

    @property
    def first(self) -> bool:
        return any(stage.first for stage in self.stages)

    @property
    def last(self) -> bool:
        return any(stage.last for stage in self.stages)

    def step(self, batches: Sequence[Batch], *, factor: Tensor) -> list[Tensor]:
        """Forward and backward pass of all micro-batches, from the sum of sums x `factor`, (K,).

        Returns the sums of each micro-batch, (K,), on the rank of the last stage.
        """
        self.factor = factor
        return self._run(self.schedule.step, batches)

    def evaluate(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Forward pass only. Returns the sums of each micro-batch, (K,), on the rank of the last stage."""
        self.factor = None
        if self.order is None:
            return self._run(self.schedule.eval, batches)
        self.schedule.pipeline_order_with_comms = {
            rank: _forward_only(actions) for rank, actions in self.order.items()
        }
        try:
            return self._run(self.schedule.eval, batches)
        finally:
            self.schedule.pipeline_order_with_comms = self.order

    def _run(self, call: Any, batches: Sequence[Batch]) -> list[Tensor]:
        self.sums = []
        for stage in self.wrapped:
            stage.batches = batches
        ids_BT = torch.cat([batch.input_ids_BT for batch in batches])  # the schedule splits them again
        last = {"target": ids_BT} if self.last else {}  # without a target, torch computes no loss
        call(*((ids_BT,) if self.first else ()), **last)
        return self.sums
