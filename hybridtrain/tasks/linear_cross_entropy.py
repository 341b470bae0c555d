"""Output head and cross-entropy in one function, in chunks of tokens, so that all logits never exist at once.

    hidden (N, D) --[chunk of n]--> logits (n, V) -> log-probabilities fp32 -> loss sum
                  d(loss sum)/d(logits) (n, V) -> gradients of hidden (N, D) and of the head's weight (V, D)

The forward pass computes the gradients too, and the backward pass only scales them, because the loss is
linear in the sum. The weight's gradient is accumulated in one buffer (`HeadGradient`) for all micro-batches
in flight. With tensor parallelism, each rank has its rows of V, and ranks exchange one number per token. This
combines Liger Kernel (arXiv 2410.10989) and Megatron-LM's vocabulary-parallel loss (arXiv 1909.08053).

The loss of a token, with probabilities p, label y, the full vocabulary W, and the two terms of `Terms`:

    (1 - s) (-log p[y])  +  s (mean over W of -log p)  +  z (log of the sum of exp(logits))^2

s: label smoothing (arXiv 1512.00567); z: z-loss, which keeps the sum of exp(logits) near 1 (PaLM,
arXiv 2204.02311, section 5).

N tokens, n in a chunk, D hidden, V vocabulary (of this rank).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridtrain.runtime.collectives import Ranks, collective
from hybridtrain.types import IGNORE_INDEX

_CHUNK_BYTES = 256 << 20  # of fp32 logits
_CHUNK_BYTES_CPU = 8 << 20  # fit the cache: 1.19 times as fast in bf16
_MIN_ROWS = 256  # with fewer, adding up the weight's gradient for each chunk would take most of the time


@dataclass(frozen=True)
class Transform:
    """What a model makes of its head's output z: logits c tanh(a z / c), with `scale` a and `cap` c, or a z
    without a cap. Gemma 2 caps (arXiv 2408.00118), Cohere and Granite scale."""

    scale: float
    cap: float | None

    @property
    def identity(self) -> bool:
        return self.scale == 1.0 and self.cap is None

    def of(self, z: Tensor) -> Tensor:
        """Logits, fp32, differentiable."""
        logits = z.float() * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def __call__(self, z: Tensor) -> Tensor:
        """Logits, fp32."""
        logits = z.float() * self.scale
        return logits if self.cap is None else torch.tanh_(logits.div_(self.cap)).mul_(self.cap)

    def backward(self, d_logits: Tensor, *, logits: Tensor) -> Tensor:
        """The gradient of z, in place, from that of `logits`."""
        if self.cap is not None:
            d_logits.mul_(1 - (logits / self.cap).square())
        return d_logits.mul_(self.scale)


IDENTITY = Transform(scale=1.0, cap=None)


@dataclass(frozen=True)
class Terms:
    """Coefficients of the terms added to cross-entropy: s and z above."""

    smoothing: float
    z_loss: float


class HeadGradient:
    """The gradient of a parameter of the head, its weight or its bias, over all micro-batches in flight.

    Forward passes add to it, backward passes take it. A backward pass takes everything that is there: its own
    micro-batch's part, and with schedules that run several forward passes first, also those of other
    micro-batches. Therefore the losses of all micro-batches in flight must be multiplied by the same factor;
    otherwise the gradient becomes NaN.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.in_flight = 0
        self.factor: Tensor | None = None
        """The factor of the first backward pass while further micro-batches are in flight; else None."""

    def clear(self) -> None:
        """Discard the gradients of forward passes without a backward pass."""
        self.total, self.in_flight, self.factor = None, 0, None

    def add(self, part: Tensor, *, alone: bool) -> None:
        """Accumulate in fp32.

        `alone`: `part` is all of a micro-batch, and keeps its dtype until something is added.
        """
        if self.total is None:
            self.total = part if alone else part.float()
        else:
            self.total = self.total.float().add_(part)

    def take(self, factor: Tensor, *, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The accumulated gradient times `factor` (0-d), in `dtype`; zeros of `shape` if an earlier
        backward pass took it.

        The rounding error is kept for the next backward pass, if there is one, so that their sum
        is exact to fp32.
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
            return (factor * 0).to(dtype).expand(shape)  # torch's split backward does not accept None
        if total.dtype == dtype:
            return total.mul_(factor)
        taken = torch.mul(total, factor, out=torch.empty_like(total, dtype=dtype))
        if self.in_flight:
            self.total = total.addcdiv_(taken, factor, value=-1)
        return taken


def linear_cross_entropy(
    hidden_BTD: Tensor,
    labels_BT: Tensor,
    *,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    transform: Transform,
    terms: Terms,
    chunk: int,
    gradients: tuple[HeadGradient, HeadGradient],
    ranks: Ranks | None,
    entries: int,
    right: Tensor | None,
) -> Tensor:
    """Sum of token losses, fp32, (1,), the same on all tp ranks.

    `ranks`: those of which each has a part of the rows of weight and bias, `entries` in all.
    `chunk`: tokens per chunk; 0: as many as fit 8 MiB in fp32 (256 MiB on a GPU), at least 256.
    `gradients`: of the weight and of the bias, for this sum.
    `right`: fp32, (1,): the number of labels whose logit is the largest is added to it.
    """
    first = 0
    if ranks is not None:
        first = ranks.rank * -(-entries // ranks.size)  # as torch.chunk
        hidden_BTD = collective("copy", hidden_BTD, ranks)
    chunk_bytes = _CHUNK_BYTES_CPU if hidden_BTD.device.type == "cpu" else _CHUNK_BYTES
    rows = chunk or max(_MIN_ROWS, chunk_bytes // (4 * max(1, weight_VD.shape[0])))
    into, into_bias = (
        gradient if torch.is_grad_enabled() and parameter is not None and parameter.requires_grad else None
        for gradient, parameter in zip(gradients, (weight_VD, bias_V), strict=True)
    )
    total = _LinearCrossEntropy.apply(
        hidden_BTD.flatten(0, 1),
        labels_BT.flatten(),
        weight_VD.detach(),
        None if bias_V is None else bias_V.detach(),
        transform,
        terms,
        entries,
        rows,
        ranks,
        first,
        into,
        into_bias,
        right,
    )
    # Nodes of their own for the parameters: a split backward pass goes once to the hidden states and once to
    # the parameters.
    if into is not None:
        total = total + _ParameterGradient.apply(weight_VD, into)
    return total if into_bias is None else total + _ParameterGradient.apply(bias_V, into_bias)


class _LinearCrossEntropy(torch.autograd.Function):
    """See the module docstring. Saves the gradient of the hidden states for backward, in their dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        labels_N: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        transform: Transform,
        terms: Terms,
        entries: int,
        rows: int,
        ranks: Ranks | None,
        first: int,
        into: HeadGradient | None,
        into_bias: HeadGradient | None,
        right: Tensor | None,
    ) -> Tensor:
        total = hidden_ND.new_zeros(1, dtype=torch.float32)
        d_hidden = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        alone = rows >= len(hidden_ND)
        for start in range(0, len(hidden_ND), rows):
            hidden, labels = hidden_ND[start : start + rows], labels_N[start : start + rows]
            logits = hidden @ weight_VD.t()
            if bias_V is not None:
                logits = logits.float().add_(bias_V)
            if not transform.identity:
                logits = transform(logits)
            log_p, log_z = _log_probabilities(logits, ranks=ranks)
            valid, mine, index = _targets(labels, first=first, vocabulary=len(weight_VD))
            if right is not None:
                right += _right(log_p, valid, mine, index, ranks=ranks)
            mine = mine * (1 - terms.smoothing)
            total -= (log_p.gather(1, index) * mine).sum() if len(weight_VD) else 0
            if terms.smoothing:
                total -= (log_p * valid).sum() * (terms.smoothing / entries)
            if terms.z_loss and (ranks is None or ranks.rank == 0):
                total += (log_z.square() * valid).sum() * terms.z_loss
            if d_hidden is None and into is None and into_bias is None:
                continue
            d_logits = log_p.exp_().mul_(valid * (1 + 2 * terms.z_loss * log_z) if terms.z_loss else valid)
            if terms.smoothing:
                d_logits -= valid * (terms.smoothing / entries)
            if len(weight_VD):
                d_logits.scatter_add_(1, index, -mine)
            if not transform.identity:
                d_logits = transform.backward(d_logits, logits=logits)
            if into_bias is not None:
                into_bias.add(d_logits.sum(0), alone=False)
            d_logits = d_logits.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight_VD, out=d_hidden[start : start + rows])
            if into is not None:
                into.add(d_logits.t() @ hidden, alone=alone)
        if ranks is not None:
            total = ranks.sum(total)
        ctx.gradient = d_hidden
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (None if ctx.gradient is None else ctx.gradient * grad.squeeze(0)), *[None] * 12


class _ParameterGradient(torch.autograd.Function):
    """Returns zero, (1,); its backward pass gives a parameter of the head its gradient."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, gradient: HeadGradient) -> Tensor:
        gradient.in_flight += 1
        ctx.gradient, ctx.shape, ctx.dtype = gradient, parameter.shape, parameter.dtype
        return parameter.new_zeros(1, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.gradient.take(grad.squeeze(0), shape=ctx.shape, dtype=ctx.dtype), None


def _log_probabilities(logits_nV: Tensor, *, ranks: Ranks | None) -> tuple[Tensor, Tensor]:
    """(log-probabilities of this rank's part of the vocabulary (n, V), log of the sum of exp(logits) over all
    of it (n, 1)), fp32.
    """
    logits = logits_nV.float()
    log_p = torch.log_softmax(logits, dim=1)
    if ranks is None:
        return log_p, logits[:, :1] - log_p[:, :1]
    mine = torch.logsumexp(logits, dim=1)
    log_z = torch.logsumexp(ranks.gather(mine[None]).view(ranks.size, -1), dim=0)
    return log_p.add_((mine - log_z)[:, None]), log_z[:, None]


def _right(log_p: Tensor, valid: Tensor, mine: Tensor, index: Tensor, *, ranks: Ranks | None) -> Tensor:
    """How many labels have the largest log-probability of the whole vocabulary, 0-d. See `_targets`."""
    none = torch.full_like(valid[:, 0], -torch.inf)
    largest, label = none, none
    if log_p.shape[1]:
        largest, label = log_p.amax(1), torch.where(mine[:, 0] > 0, log_p.gather(1, index)[:, 0], none)
    if ranks is not None:
        largest, label = ranks.max(torch.stack([largest, label])).unbind()
    return ((label >= largest) * valid[:, 0]).sum()


def _targets(labels_n: Tensor, *, first: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three tensors (n, 1): 1 if the token has a label; 1 if the label's logit is on this rank; index
    of that logit here.
    """
    valid = labels_n != IGNORE_INDEX
    place = labels_n - first
    mine = valid & (place >= 0) & (place < vocabulary)
    return valid.float()[:, None], mine.float()[:, None], place.where(mine, 0)[:, None]
