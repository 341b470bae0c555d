"""Output head and cross-entropy in one function, in chunks of tokens, so that all logits never exist at once.

    hidden (N, D) --[chunk of n]--> logits (n, V) -> log-probabilities fp32 -> loss sum, and at once d(loss sum)/d(logits)
                                                  -> gradients of hidden (N, D) and of the head's weight (V, D)

The gradients are ready before backward is called, which only scales them: the loss sum is linear in what comes after it.
The weight's is added up in one buffer (`HeadGradient`), however many micro-batches wait for their backward pass.
Under tensor parallelism each rank has its rows of V and the ranks exchange one number per token. The idea is that of
Liger Kernel (arXiv 2410.10989) and of Megatron-LM's vocabulary-parallel loss (arXiv 1909.08053).

Two terms may be added to a token's loss (`Terms`), which is then, with p the probabilities, y the label and W the whole vocabulary:

    (1 - s) (-log p[y])  +  s (mean over W of -log p)  +  z (log of the sum of exp(logits))^2

s smooths labels (arXiv 1512.00567), z keeps the logits' normaliser near 1 (PaLM, arXiv 2204.02311, section 5).

N tokens, n of a chunk, D hidden, V vocabulary (of this rank).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from hybridtrain.types import IGNORE_INDEX

_CHUNK_BYTES = 256 << 20  # of fp32 logits
_CHUNK_BYTES_CPU = 8 << 20  # they stay in its cache: 1.19 times as fast in bf16
_LEAST_ROWS = 256  # each chunk adds the weight's gradient up once: fewer tokens would make that the larger part


@dataclass(frozen=True)
class Terms:
    """What is added to cross-entropy."""

    smoothing: float
    z_loss: float


class HeadGradient:
    """The gradient of a stage's head weight over all micro-batches in flight: forward passes add to it, backward passes take from it.

    A micro-batch's part is in here before its backward pass comes, so whatever a backward pass finds may leave with it: with one
    micro-batch in flight its own part, under schedules that run several forward passes first the sum of theirs. So the losses of
    micro-batches in flight together must be multiplied by the same factor; where they are not, the gradient is NaN.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.in_flight = 0
        self.factor: Tensor | None = None
        """Of the first backward pass that took parts of several micro-batches; None: none has."""

    def clear(self) -> None:
        """Forget forward passes that no backward pass followed."""
        self.total, self.in_flight, self.factor = None, 0, None

    def add(self, part: Tensor, *, alone: bool) -> None:
        """Accumulate in fp32. `alone`: the whole part of a micro-batch, kept in its dtype while nothing is added to it."""
        if self.total is None:
            self.total = part if alone else part.float()
        else:
            self.total = self.total.float().add_(part)

    def take(self, factor: Tensor, *, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """What has been added up, times `factor` (0-d), in `dtype`; zeros of `shape` if an earlier backward pass has taken it.

        What is lost to rounding stays for the next backward pass, as long as there is one, so that the sum is that of fp32.
        """
        total, self.total = self.total, None
        self.in_flight -= 1
        if self.factor is not None:
            factor = torch.where(factor == self.factor, factor, torch.nan)
        if self.in_flight == 0:
            self.factor = None
        elif self.factor is None:
            self.factor = factor
        if total is None:
            return (factor * 0).to(dtype).expand(shape)  # not None, which torch's split backward refuses
        if total.dtype == dtype:
            return total.mul_(factor)
        taken = torch.mul(total, factor, out=torch.empty_like(total, dtype=dtype))
        if self.in_flight:
            self.total = total.addcdiv_(taken, factor, value=-1)
        return taken


def linear_cross_entropy(hidden_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, *, terms: Terms, chunk: int, gradient: HeadGradient) -> Tensor:
    """Sum of token losses in fp32, shape (1,), the same on all tp ranks.

    `hidden_BTD` may be a DTensor sharded over T or replicated, `weight_VD` one sharded over V. `chunk`: tokens whose logits
    are held at once; 0: as many as fit 8 MiB in fp32 (on a GPU 256 MiB), but 256 at least. `gradient`: the weight's, of this stage.
    """
    group, first, entries = None, 0, weight_VD.shape[0]
    if isinstance(weight_VD, DTensor):
        mesh = weight_VD.device_mesh
        group = mesh.get_group()
        first = mesh.get_local_rank() * -(-weight_VD.shape[0] // mesh.size())  # DTensor cuts as torch.chunk does
        assert isinstance(hidden_BTD, DTensor)
        hidden_BTD = hidden_BTD.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        weight_VD = weight_VD.to_local()
    held = _CHUNK_BYTES_CPU if hidden_BTD.device.type == "cpu" else _CHUNK_BYTES
    rows = chunk or max(_LEAST_ROWS, held // (4 * max(1, weight_VD.shape[0])))
    into = gradient if torch.is_grad_enabled() and weight_VD.requires_grad else None
    total = _LinearCrossEntropy.apply(hidden_BTD.flatten(0, 1), weight_VD.detach(), labels_BT.flatten(), terms, entries, rows, group, first, into)
    # The weight has a node of its own: a split backward passes once for the hidden states and once for the weight.
    return total if into is None else total + _WeightGradient.apply(weight_VD, into)


class _LinearCrossEntropy(torch.autograd.Function):
    """See the module. The gradient of the hidden states is kept for backward, in their dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        terms: Terms,
        entries: int,
        rows: int,
        group: dist.ProcessGroup | None,
        first: int,
        into: HeadGradient | None,
    ) -> Tensor:
        total = hidden_ND.new_zeros(1, dtype=torch.float32)
        d_hidden = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden_ND), rows):
            hidden, labels = hidden_ND[start : start + rows], labels_N[start : start + rows]
            log_p, log_z = _log_probabilities(hidden @ weight_VD.t(), group=group)
            valid, mine, index = _targets(labels, first=first, vocabulary=len(weight_VD))
            mine = mine * (1 - terms.smoothing)
            total -= (log_p.gather(1, index) * mine).sum() if len(weight_VD) else 0
            if terms.smoothing:
                total -= (log_p * valid).sum() * (terms.smoothing / entries)
            if terms.z_loss and (group is None or group.rank() == 0):
                total += (log_z.square() * valid).sum() * terms.z_loss
            if d_hidden is None and into is None:
                continue
            d_logits = log_p.exp_().mul_(valid * (1 + 2 * terms.z_loss * log_z) if terms.z_loss else valid)
            if terms.smoothing:
                d_logits -= valid * (terms.smoothing / entries)
            if len(weight_VD):
                d_logits.scatter_add_(1, index, -mine)
            d_logits = d_logits.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight_VD, out=d_hidden[start : start + rows])
            if into is not None:
                into.add(d_logits.t() @ hidden, alone=rows >= len(hidden_ND))
        if group is not None:
            dist.all_reduce(total, group=group)
        ctx.gradient = d_hidden
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (None if ctx.gradient is None else ctx.gradient * grad.squeeze(0)), *[None] * 8


class _WeightGradient(torch.autograd.Function):
    """Zero, of shape (1,), through which the head's weight gets its gradient."""

    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, gradient: HeadGradient) -> Tensor:
        gradient.in_flight += 1
        ctx.gradient, ctx.shape, ctx.dtype = gradient, weight_VD.shape, weight_VD.dtype
        return weight_VD.new_zeros(1, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.gradient.take(grad.squeeze(0), shape=ctx.shape, dtype=ctx.dtype), None


def _log_probabilities(logits_nV: Tensor, *, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """In fp32: log-probabilities over the whole vocabulary, of this rank's rows of it, (n, V), and the log of their normaliser, (n, 1)."""
    logits = logits_nV.float()
    log_p = torch.log_softmax(logits, dim=1)
    if group is None:
        return log_p, logits[:, :1] - log_p[:, :1]
    mine = torch.logsumexp(logits, dim=1)
    every = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(every, mine, group=group)
    whole = torch.logsumexp(torch.stack(every), dim=0)
    return log_p.add_((mine - whole)[:, None]), whole[:, None]


def _targets(labels_n: Tensor, *, first: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three columns (n, 1): 1 where a token has a label; 1 where the logit of the label is on this rank; the index of the label on this rank."""
    valid = labels_n != IGNORE_INDEX
    place = labels_n - first
    mine = valid & (place >= 0) & (place < vocabulary)
    return valid.float()[:, None], mine.float()[:, None], place.where(mine, 0)[:, None]
