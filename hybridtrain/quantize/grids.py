"""The numbers that codes stand for. A grid belongs to a matrix (N, K): groups of `size` neighbours in a row
share a scale, and with affine integers a zero point.

    value = (code - zero) * scale          integers
    value = level[code] * scale            all others; of 8-bit floats the code is the float itself

N outputs, K inputs, G groups in a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridtrain.models.quantised import NF4_LEVELS
from hybridtrain.plan.formats import E4M3, E5M2, Number
from hybridtrain.precision import integers
from hybridtrain.precision.round import round_to
from hybridtrain.quantize.schemes import Scheme

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The numbers of e2m1, without signs."""
_FLOATS: Mapping[str, Number] = {"e4m3": E4M3, "e5m2": E5M2}
_ROUNDS = 12  # of k-means


@dataclass(frozen=True)
class Grid:
    """Of a matrix, or of a part of its columns."""

    scheme: Scheme
    size: int
    """Columns that share a scale."""
    scale_NG: Tensor
    """fp32; (1, 1) for one scale of all."""
    zero_NG: Tensor | None
    levels: Tensor | None
    """Ascending, fp32; None for integers and 8-bit floats."""

    def nearest(self, x: Tensor, *, start: int) -> Tensor:
        """The codes nearest to x (N, columns), whose first column is `start` in the matrix: int32, or of
        8-bit floats these floats.
        """
        scaled, scheme = x / self._over(self.scale_NG, x, start), self.scheme
        if scheme.codes in _FLOATS:
            return round_to(scaled, _FLOATS[scheme.codes])
        if self.levels is not None:
            return torch.bucketize(scaled, (self.levels[1:] + self.levels[:-1]) / 2, out_int32=True)
        if self.zero_NG is not None:
            shifted = scaled.round() + self._over(self.zero_NG, x, start)
            return shifted.clamp(0, 2**scheme.bits - 1).int()
        return integers.nearest(scaled, _largest(scheme)).int()

    def values(self, codes: Tensor, *, start: int) -> Tensor:
        """What codes stand for, fp32."""
        numbers = self.levels[codes] if self.levels is not None else codes.float()
        if self.zero_NG is not None:
            numbers = numbers - self._over(self.zero_NG, codes, start)
        return numbers * self._over(self.scale_NG, codes, start)

    def rounded(self, x: Tensor, *, start: int) -> Tensor:
        """The nearest numbers of the grid."""
        return self.values(self.nearest(x, start=start), start=start)

    def _over(self, of_groups: Tensor, x: Tensor, start: int) -> Tensor:
        """Of each column of x what is its group's."""
        if of_groups.shape[1] == 1:
            return of_groups
        columns = torch.arange(start, start + x.shape[1], device=x.device) // self.size
        return of_groups[:, columns]


def grid_of(weight: Tensor, scheme: Scheme) -> Grid:
    """The grid for a matrix (N, K), whose scales are found from its largest values.

    Scales are rounded as they are stored, before codes are chosen.
    """
    weight = weight.float()
    size = scheme.group if scheme.share == "group" else weight.shape[1]
    blocks = weight.reshape(weight.shape[0], -1, size)
    if scheme.share == "tensor":
        blocks = weight.reshape(1, 1, -1)
    if scheme.affine:
        return _affine(blocks, scheme, size)
    largest = blocks.abs().amax(-1).clamp(min=integers.SMALLEST)
    levels = _levels(weight, scheme, largest)
    scale = _scale(largest, scheme, levels)
    return Grid(scheme, size, scale, None, levels)


def _affine(blocks: Tensor, scheme: Scheme, size: int) -> Grid:
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    steps = 2**scheme.bits - 1
    scale = ((high - low) / steps).clamp(min=integers.SMALLEST).bfloat16().float()
    return Grid(scheme, size, scale, (-low / scale).round().clamp(0, steps), None)


def _largest(scheme: Scheme) -> int:
    return 2 ** (scheme.bits - 1) - 1


def _levels(weight: Tensor, scheme: Scheme, largest: Tensor) -> Tensor | None:
    device = weight.device
    if scheme.codes == "nf4":
        return torch.tensor(NF4_LEVELS, device=device)
    if scheme.codes in ("nvfp4", "mxfp4"):
        return torch.tensor([*(-level for level in reversed(FP4[1:])), *FP4], device=device)
    if scheme.codes == "codebook":
        return _clustered(weight / largest, 2**scheme.bits)
    return None


def _scale(largest: Tensor, scheme: Scheme, levels: Tensor | None) -> Tensor:
    if (
        scheme.codes == "mxfp4"
    ):  # OCP MX v1.0: of the largest power of two that is not above the largest value
        return 2.0 ** (largest.log2().floor() - 2).clamp(min=-127)
    if scheme.codes == "nvfp4":
        whole = largest.max() / (FP4[-1] * E4M3.largest)
        smallest = E4M3.smallest_subnormal
        return round_to((largest / FP4[-1] / whole).clamp(min=smallest), E4M3).float() * whole
    if scheme.codes in _FLOATS:
        number = _FLOATS[scheme.codes].largest
    else:
        number = 1.0 if levels is not None else float(_largest(scheme))
    return integers.scale_of(largest, number)


def _clustered(unit: Tensor, count: int) -> Tensor:
    """`count` numbers near which values of [-1, 1] are (Lloyd's algorithm), ascending: the best for their
    squared error.
    """
    values = unit.flatten().sort().values
    places = (torch.arange(count, device=unit.device) * 2 + 1) * (len(values) - 1) // (2 * count)
    levels = values[places].clone()
    sums = torch.cat([values.new_zeros(1, dtype=torch.float64), values.double().cumsum(0)])
    for _ in range(_ROUNDS):
        ends = torch.searchsorted(values, (levels[1:] + levels[:-1]) / 2)
        ends = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(values))])
        counts = ends.diff()
        means = (sums[ends[1:]] - sums[ends[:-1]]) / counts.clamp(min=1)
        levels = torch.where(counts > 0, means.float(), levels)
    return levels.bfloat16().float().sort().values
