"""Parallel layouts: the degree of each axis, and sizes computed from the degrees. No torch.

    world = pp x dp_replicate x dp_shard x cp x tp          (tp varies fastest over ranks)

`resolve` computes the degrees from the options. rules.py refuses layouts that cannot run,
before the processes connect.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridtrain.plan import rules

if TYPE_CHECKING:
    from hybridtrain.config import schema

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class ParallelLayout:
    """The degree of every axis. `str` returns the form of `parity` and file names: pp2-dp_shard2-tp2."""

    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    pp: int

    def axes(self) -> tuple[tuple[str, int], ...]:
        return tuple((axis, getattr(self, axis)) for axis in AXES)

    def degree(self, axis: str) -> int:
        return dict(self.axes())[axis]

    @property
    def world_size(self) -> int:
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def dp(self) -> int:
        """Number of data ranks, which read different rows."""
        return self.dp_replicate * self.dp_shard

    def coordinates(self, rank: int) -> dict[str, int]:
        """The coordinate of `rank` on each axis."""
        result = {}
        for axis, degree in reversed(self.axes()):
            rank, result[axis] = divmod(rank, degree)
        return result

    def __str__(self) -> str:
        return "-".join(f"{axis}{degree}" for axis, degree in self.axes() if degree > 1) or "single"


def resolve(parallel: schema.ParallelConfig, *, world_size: int) -> ParallelLayout:
    """The layout, with a degree of -1 replaced.

    Raises UserError for degrees whose product is not `world_size`.
    """
    degrees = {axis: getattr(parallel, axis) for axis in AXES}
    rules.require(rules.of_degrees(degrees, world_size=world_size))
    fixed = math.prod(degree for degree in degrees.values() if degree != -1)
    return ParallelLayout(
        **{axis: world_size // fixed if degree == -1 else degree for axis, degree in degrees.items()}
    )
