"""Checks that replicas of the parameters are bitwise equal: a rank whose memory or arithmetic failed drifts
away from the others without a word.

Replicas are the parts of a parameter with the same place in the whole one, on whatever ranks: data-parallel
ones, tensor-parallel ones of what is not cut, and pipeline stages that share a parameter.
"""

# ruff: noqa: ARG002 - a callback has the arguments of its interface

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hybridtrain.errors import UserError
from hybridtrain.parallel.grad_norm import local_part
from hybridtrain.parallel.mesh import Mesh, from_rank0, gather_on_rank0, sharded_over
from hybridtrain.runtime import log
from hybridtrain.training.callbacks import Callback, Run, StepInfo
from hybridtrain.types import Engine

_log = log.get("train")
_CHUNK = 1 << 22
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)
_SHOWN = 3
Place = tuple[str, tuple[int, ...]]
"""(parameter, coordinates of the rank along the axes over which it is sharded)."""


class Guard(Callback):
    """Compares replicas every `every` steps, and after the last; the run ends where they differ."""

    def __init__(self, engine: Engine, *, every: int, mesh: Mesh):
        self.engine, self.every, self.mesh = engine, every, mesh

    def on_start(self, run: Run) -> None:
        of_ranks = gather_on_rank0(digests(self.engine, mesh=self.mesh))
        if of_ranks and max(Counter(place for each in of_ranks for place in each).values()) == 1:
            _log.warning("train.guard_every: no part of a parameter has a replica in this layout")

    def on_every_step(self, run: Run, info: StepInfo) -> None:
        if info.last or info.step % self.every == 0:
            text = from_rank0(_difference(gather_on_rank0(digests(self.engine, mesh=self.mesh))))
            if text:
                raise UserError(
                    f"train.guard_every={self.every}: after step {info.step} {text}\n"
                    "  allowed: replicas that are bitwise equal, as those of all earlier checks were\n"
                    "  try:     the last checkpoint, without the node of that rank: its memory or arithmetic "
                    "has failed"
                )


def digests(engine: Engine, *, mesh: Mesh) -> dict[Place, int]:
    """A digest of the bits of each part of a parameter that this rank has. Waits for the device."""
    places, values = [], []
    for name, parameter in engine.weights():
        axes = sorted(sharded_over(parameter))
        places.append((name, tuple(mesh.coordinates[axis] for axis in axes)))
        values.append(_digest(local_part(parameter.detach())))
    return dict(zip(places, torch.stack(values).tolist(), strict=True)) if values else {}


def _digest(part: Tensor) -> Tensor:
    """Of the bits and where they stand, int64, 0-d: any change of a single element changes it."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[part.element_size()]
    bits = part.contiguous().view(whole).flatten()
    total = torch.zeros((), dtype=torch.int64, device=part.device)
    for start in range(0, bits.numel(), _CHUNK):
        chunk = bits[start : start + _CHUNK].long()
        where = torch.arange(start, start + len(chunk), device=part.device)
        total += (chunk * (2 * where * _ODD + 1)).sum()
    return total


def _difference(of_ranks: Sequence[Mapping[Place, int]]) -> str:
    """The parameters whose replicas differ, and on which ranks; empty: none (and on ranks other than 0)."""
    found = list(_differing(of_ranks))
    if not found:
        return ""
    more = f"; and {len(found) - _SHOWN} more parameters" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more


def _differing(of_ranks: Sequence[Mapping[Place, int]]) -> Iterator[str]:
    for place in dict.fromkeys(place for each in of_ranks for place in each):
        values = {rank: each[place] for rank, each in enumerate(of_ranks) if place in each}
        (most, _), *others = Counter(values.values()).most_common()
        if others:
            odd = [str(rank) for rank, value in values.items() if value != most]
            same = [str(rank) for rank, value in values.items() if value == most]
            which = f"those of rank {', '.join(odd)} from those of rank {', '.join(same)}"
            yield f"replicas of {place[0]} differ: {which}"
