"""What optimizers work on: this rank's local shards (`LocalShard`), not DTensors, so that an update is one fused call whatever the mesh.

parameter (DTensor) --local_shards--> LocalShard(name, parameter, shard)      `shard` shares memory with the parameter; its gradient is the parameter's own
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hybridtrain.config.schema import OptimConfig
from hybridtrain.models.patterns import matches


@dataclass(frozen=True)
class LocalShard:
    """One trained parameter: its name, the parameter the model uses, and a view of this rank's shard that the optimizer updates."""

    name: str
    parameter: nn.Parameter
    shard: nn.Parameter


def local_shards(named: Iterable[tuple[str, nn.Parameter]]) -> list[LocalShard]:
    """Shards of the parameters that require gradients, sharing memory with them."""
    return [LocalShard(name, parameter, nn.Parameter(local(parameter).detach())) for name, parameter in named if parameter.requires_grad]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(part: Tensor, parameter: nn.Parameter) -> Tensor:
    """A DTensor over `part`, placed as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return part
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())


def groups(named: Sequence[tuple[str, int, nn.Parameter]], settings: OptimConfig) -> list[dict[str, Any]]:
    """(name, dimensions, parameter) as torch's optimizers take them: those with weight decay, and those without."""
    decays = [dimensions > 1 and not matches(name, settings.no_decay) for name, dimensions, _ in named]
    decayed, plain = ([p for (_, _, p), decay in zip(named, decays, strict=True) if decay is with_decay] for with_decay in (True, False))
    return [g for g in ({"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}) if g["params"]]


class Update:
    """Base of optimizers over shards: sets the gradients before a step, frees them after it."""

    optimizer: torch.optim.Optimizer | None
    """torch's; None on a rank that trains nothing."""

    def __init__(self, shards: list[LocalShard]):
        self.shards = shards
        self.watch: Callable[[], None] | None = None
        """Called once, when the next step has its gradients, which are reduced and still scaled."""

    def begin(self) -> list[Tensor]:
        """Assign each shard its gradient, and return the gradients that exist."""
        watch, self.watch = self.watch, None
        if watch:
            watch()
        for item in self.shards:
            item.shard.grad = None if item.parameter.grad is None else local(item.parameter.grad)
        return [item.shard.grad for item in self.shards if item.shard.grad is not None]

    def free(self) -> None:
        for item in self.shards:
            item.parameter.grad = item.shard.grad = None

    def step(self, *, lr: float, divide: Tensor, skip: Tensor) -> None:
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def copy_state(self, source: LocalShard, target: LocalShard) -> None:
        raise NotImplementedError

    def prepare(self, stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Before a checkpoint is loaded, of which dtypes and whole shapes are known by key."""

    def adopt(self, loaded: Mapping[str, Tensor]) -> None:
        """After a checkpoint was loaded into what `state` had given."""
