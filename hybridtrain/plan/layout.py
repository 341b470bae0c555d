"""Parallel layouts: the degree of each axis, and sizes computed from the degrees. Pure arithmetic, no torch, no process group.

    world = pp x dp_replicate x dp_shard x cp x tp          (tp varies fastest over ranks)

`resolve` computes the degrees from the options. Layouts that cannot run are refused by rules.py, before processes connect.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridtrain.plan import rules

if TYPE_CHECKING:
    from hybridtrain.config import schema

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class ParallelLayout:
    """Degrees of every axis. `str` gives the form that `parity` and file names use: pp2-dp_shard2-tp2."""

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
        """Data ranks: how many different micro-batches are in flight at once."""
        return self.dp_replicate * self.dp_shard

    def coordinates(self, rank: int) -> dict[str, int]:
        """Coordinate of `rank` on each axis."""
        result = {}
        for axis, degree in reversed(self.axes()):
            rank, result[axis] = divmod(rank, degree)
        return result

    def __str__(self) -> str:
        return "-".join(f"{axis}{degree}" for axis, degree in self.axes() if degree > 1) or "single"


def resolve(parallel: schema.ParallelConfig, *, world_size: int) -> ParallelLayout:
    """Fill in the one -1; raises UserError for degrees that do not multiply out to `world_size`."""
    degrees = {axis: getattr(parallel, axis) for axis in AXES}
    rules.require(rules.of_degrees(degrees, world_size=world_size))
    fixed = math.prod(degree for degree in degrees.values() if degree != -1)
    return ParallelLayout(**{axis: world_size // fixed if degree == -1 else degree for axis, degree in degrees.items()})


def stage_layers(layers: int, stages: int) -> list[range]:
    """Cut `layers` into `stages` runs. The first `layers % stages` stages hold one more; embedding and head ride along.

    >>> stage_layers(5, 2)
    [range(0, 3), range(3, 5)]
    """
    base, extra = divmod(layers, stages)
    cuts = [0]
    for stage in range(stages):
        cuts.append(cuts[-1] + base + (stage < extra))
    return [range(a, b) for a, b in itertools.pairwise(cuts)]
