"""Numbers in 8 bits: blocks of 128 elements of a row share a scale, and an element is a code into a table.

    x (..., n) fp32   <->   codes (..., n) uint8,  scales (..., n / 128) fp32: largest magnitude of a block

The table is the dynamic map of "8-bit Optimizers via Block-wise Quantization" (Dettmers et al., arXiv
2110.02861): seven decades below 1, with twice as many steps in each as in the one below it, so that large
values are precise and small ones are not lost. Blocks lie within rows of the whole tensor, so that a shard
that cuts no block has the codes and scales of the whole.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hybridtrain.plan.optimizer_states import BLOCK

_DECADES = 7


@functools.cache
def dynamic_map(signed: bool) -> tuple[float, ...]:
    """The 256 values of the table, in order: from -1 to 1, or from 0 to 1 if not `signed`.

    A decade is cut into equal steps, of which the middles are values; 0 and 1 are values, too.
    """
    positive = []
    for decade in range(_DECADES):
        steps = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, steps + 1)
        middles = (edges[:-1] + edges[1:]) / 2
        positive += (10.0 ** (decade - _DECADES + 1) * middles).tolist()
    return tuple(sorted([*([-value for value in positive] if signed else []), 0.0, *positive, 1.0]))


@functools.cache
def _table(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """(values, the boundaries between them) on a device. Made once: the copy to a GPU is waited for."""
    values = torch.tensor(dynamic_map(signed), dtype=torch.float32)
    return values.to(device), ((values[1:] + values[:-1]) / 2).to(device)


def zeros(shape: torch.Size, *, signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes and scales of zeros."""
    _table(signed, device)
    codes = torch.full(shape, dynamic_map(signed).index(0.0), dtype=torch.uint8, device=device)
    return codes, torch.zeros(*shape[:-1], shape[-1] // BLOCK, dtype=torch.float32, device=device)


def encode(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (..., n) and scales (..., n / 128) of fp32 values (..., n)."""
    _, boundaries = _table(signed, values.device)
    blocks = values.unflatten(-1, (-1, BLOCK))
    scales = blocks.abs().amax(-1)
    shares = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    return torch.bucketize(shares, boundaries, out_int32=True).to(torch.uint8).flatten(-2), scales


def decode(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """fp32 values (..., n) of codes (..., n) and scales (..., n / 128)."""
    table, _ = _table(signed, codes.device)
    shares = table.index_select(0, codes.flatten().int()).view(codes.shape)
    return (shares.unflatten(-1, (-1, BLOCK)) * scales[..., None]).flatten(-2)
