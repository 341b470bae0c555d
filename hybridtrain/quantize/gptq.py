"""GPTQ (arXiv 2210.17323): columns of a weight are rounded one after the other, and what each loses is made
up for by those that come later, so that the layer's outputs on calibration rows change least. The columns
of the largest inputs come first, whose errors cost most: then all others can make up for them.

N outputs, K inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridtrain.errors import refusal
from hybridtrain.quantize.grids import Grid, grid_of
from hybridtrain.quantize.schemes import Scheme

_DAMPING = (0.01, 0.1, 1.0)
"""Shares of the mean diagonal that are added to it, in turn until the matrix has an inverse."""
_BLOCK = 128
"""Columns after which what they lose is spread over all later ones at once."""


def quantise(
    weight: Tensor, hessian: Tensor, scheme: Scheme, *, path: str, field: str
) -> tuple[Grid, Tensor]:
    """(grid, codes (N, K)) of a weight. `hessian`: x^T x of its inputs, fp32 (K, K).

    Scales are those of the weight as it is. Raises UserError where the inputs do not determine the codes.
    """
    weight, hessian = weight.float().clone(), hessian.clone()
    dead = hessian.diagonal() <= 0
    hessian.diagonal()[dead] = 1.0  # inputs that are always 0: their weights count for nothing
    grid = grid_of(weight, scheme)
    weight[:, dead] = 0.0
    order = hessian.diagonal().argsort(descending=True, stable=True)
    weight, hessian = weight[:, order], hessian[order][:, order]
    upper = _inverse_root(hessian, path=path, scheme=scheme, field=field)
    codes, places = [], order.tolist()
    for start in range(0, weight.shape[1], _BLOCK):
        stop = min(start + _BLOCK, weight.shape[1])
        errors = torch.zeros(weight.shape[0], stop - start, device=weight.device)
        for column in range(start, stop):
            here = weight[:, column : column + 1]
            code = grid.nearest(here, start=places[column])
            codes.append(code)
            error = (here - grid.values(code, start=places[column])) / upper[column, column]
            weight[:, column + 1 : stop] -= error * upper[column, column + 1 : stop]
            errors[:, column - start] = error[:, 0]
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return grid, torch.cat(codes, dim=1)[:, order.argsort()]


def _inverse_root(hessian: Tensor, *, path: str, scheme: Scheme, field: str) -> Tensor:
    """The upper Cholesky factor of the inverse."""
    mean = hessian.diagonal().mean()
    for damping in _DAMPING:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed or not lower.isfinite().all():
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and upper.isfinite().all():
            return upper
    raise refusal(
        field,
        scheme.name,
        f"the inputs of {path} on the calibration rows have no Cholesky factor, with up to "
        f"{_DAMPING[-1]:g} of their mean square added",
        allowed="rows whose inputs are finite and differ",
        instead="more or other rows (quantize.rows, data.path), or the scheme without gptq",
    )


def check_tokens(tokens: int, *, inputs: int, path: str, scheme: Scheme, field: str) -> None:
    """Refuse fewer calibration tokens than a weight has columns (raises UserError)."""
    if scheme.gptq and tokens < inputs:
        raise refusal(
            field,
            tokens,
            f"calibration tokens are fewer than the {inputs} inputs of {path}: they would not determine it",
            allowed=f"rows with {inputs} tokens or more",
            instead="more rows, or the scheme without gptq",
        )
