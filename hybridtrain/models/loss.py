"""Head and cross-entropy in one function, in chunks of tokens: all logits never exist at once.

    hidden (N, D) --[chunk of n]--> logits (n, V) -> log-probabilities fp32 -> loss sum, and at once d(loss sum)/d(logits)
                                                  -> gradients of hidden (N, D) and of the head's weight (V, D)

The gradients are ready before backward is called, which only scales them: the loss sum is linear in what comes after it.
Under tensor parallelism each rank has its rows of V and the ranks exchange one number per token. The idea is that of
Liger Kernel (arXiv 2410.10989) and of Megatron-LM's vocabulary-parallel loss (arXiv 1909.08053).

N tokens, n of a chunk, D hidden, V vocabulary (of this rank).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from hybridtrain.types import IGNORE_INDEX

_CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}  # of fp32 logits; on a CPU they stay in its cache: 1.19 times as fast in bf16
_LEAST_ROWS = 256  # each chunk adds the weight's gradient up once: fewer tokens would make that the larger part


def linear_cross_entropy(hidden_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, *, chunk: int) -> Tensor:
    """Sum of token losses in fp32, shape (1,), the same on all tp ranks.

    `hidden_BTD` may be a DTensor sharded over T or replicated, `weight_VD` one sharded over V. `chunk`: tokens whose logits
    are held at once; 0: as many as fit 8 MiB in fp32 (on a GPU 256 MiB), but 256 at least.
    """
    group, first = None, 0
    if isinstance(weight_VD, DTensor):
        mesh = weight_VD.device_mesh
        group = mesh.get_group()
        first = mesh.get_local_rank() * -(-weight_VD.shape[0] // mesh.size())  # DTensor cuts as torch.chunk does
        assert isinstance(hidden_BTD, DTensor)
        hidden_BTD = hidden_BTD.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        weight_VD = weight_VD.to_local()
    rows = chunk or max(_LEAST_ROWS, _CHUNK_BYTES[hidden_BTD.device.type] // (4 * max(1, weight_VD.shape[0])))
    return _LinearCrossEntropy.apply(hidden_BTD.flatten(0, 1), weight_VD, labels_BT.flatten(), rows, group, first)


class _LinearCrossEntropy(torch.autograd.Function):
    """See the module. Gradients are accumulated over chunks in fp32 and handed on in the compute dtype."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, rows: int, group: dist.ProcessGroup | None, first: int) -> Tensor:
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        total = hidden_ND.new_zeros(1, dtype=torch.float32)
        d_hidden = torch.empty_like(hidden_ND) if for_hidden else None
        d_weight = None
        for start in range(0, len(hidden_ND), rows):
            hidden, labels = hidden_ND[start : start + rows], labels_N[start : start + rows]
            log_p = _log_probabilities(hidden @ weight_VD.t(), group=group)
            valid, mine, index = _targets(labels, first=first, vocabulary=len(weight_VD))
            total -= (log_p.gather(1, index) * mine).sum() if len(weight_VD) else 0
            if not (for_hidden or for_weight):
                continue
            d_logits = log_p.exp_().mul_(valid)
            if len(weight_VD):
                d_logits.scatter_add_(1, index, -mine)
            d_logits = d_logits.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight_VD, out=d_hidden[start : start + rows])
            if for_weight:
                d_weight = _add(d_weight, d_logits.t() @ hidden, alone=rows >= len(hidden_ND))
        if group is not None:
            dist.all_reduce(total, group=group)
        ctx.gradients = d_hidden, d_weight
        ctx.dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # Not in place: a split backward comes here twice, once for the hidden states and once for the weight.
        scaled = [None if gradient is None else (gradient * grad.squeeze(0)).to(ctx.dtype) for gradient in ctx.gradients]
        return *scaled, None, None, None, None


def _log_probabilities(logits_nV: Tensor, *, group: dist.ProcessGroup | None) -> Tensor:
    """fp32 log-probabilities over the whole vocabulary, of this rank's rows of it."""
    logits = logits_nV.float()
    log_p = torch.log_softmax(logits, dim=1)
    if group is None:
        return log_p
    mine = torch.logsumexp(logits, dim=1)
    every = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(every, mine, group=group)
    return log_p.add_((mine - torch.logsumexp(torch.stack(every), dim=0))[:, None])


def _targets(labels_n: Tensor, *, first: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Columns (n, 1): 1 where a token has a label; 1 where this rank also has the label's logit; the label's place on this rank."""
    valid = labels_n != IGNORE_INDEX
    place = labels_n - first
    mine = valid & (place >= 0) & (place < vocabulary)
    return valid.float()[:, None], mine.float()[:, None], place.where(mine, 0)[:, None]


def _add(total: Tensor | None, part: Tensor, *, alone: bool) -> Tensor:
    """Accumulate in fp32, unless there is only one part."""
    if alone:
        return part
    return part.float() if total is None else total.add_(part)
