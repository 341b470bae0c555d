"""Optimizers update this rank's local shards, not DTensors, so that an update is one fused
call under every mesh.

parameter (DTensor) --local_shards--> LocalShard(name, parameter, shard)   `shard`: the parameter's memory
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from hybridtrain.config.schema import OptimConfig
from hybridtrain.models.patterns import matches


@dataclass(frozen=True)
class LocalShard:
    """One trained parameter: its name, the model's parameter, and a view of this rank's shard,
    which the optimizer updates.
    """

    name: str
    parameter: nn.Parameter
    shard: nn.Parameter


def local_shards(named: Iterable[tuple[str, nn.Parameter]]) -> list[LocalShard]:
    """Shards of the parameters that require gradients, sharing memory with them."""
    return [
        LocalShard(name, parameter, nn.Parameter(local(parameter).detach()))
        for name, parameter in named
        if parameter.requires_grad
    ]


@functools.cache
def on_cpu(mesh: DeviceMesh) -> DeviceMesh:
    """A mesh of the same ranks for tensors in the host's memory; its collectives are not used."""
    groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]
    return DeviceMesh.from_group(groups, "cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)


class HostCopy(LocalShard):
    """A parameter whose update is computed in the host's memory: `shard` is a copy there, in pinned memory if
    the parameter is on a GPU.
    """


def in_host_memory(shards: Iterable[LocalShard]) -> list[LocalShard]:
    """The same with copies of the weights in the host's memory."""
    return [
        HostCopy(
            item.name,
            item.parameter,
            nn.Parameter(
                torch.empty(
                    item.shard.shape, dtype=item.shard.dtype, pin_memory=item.shard.device.type == "cuda"
                ).copy_(item.shard.detach())
            ),
        )
        for item in shards
    ]


@torch.no_grad()
def read_weights(shards: Iterable[LocalShard]) -> None:
    """Give copies in the host's memory the weights of the model."""
    for item in shards:
        if isinstance(item, HostCopy):
            item.shard.copy_(local(item.parameter))


@torch.no_grad()
def write_weights(shards: Iterable[LocalShard]) -> None:
    """Give the model the weights of copies in the host's memory. Does not wait for the device."""
    for item in shards:
        if isinstance(item, HostCopy):
            local(item.parameter).copy_(item.shard, non_blocking=True)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_first(parameter: Tensor) -> bool:
    """Whether this rank is the first of those that hold the same part of a parameter."""
    if not isinstance(parameter, DTensor):
        return True
    place = parameter.device_mesh.get_coordinate()
    assert place is not None
    return not any(
        at for at, placement in zip(place, parameter.placements, strict=True) if placement.is_replicate()
    )


def like(part: Tensor, parameter: Tensor, *, shape: Sequence[int]) -> Tensor:
    """`part` of a tensor of the whole `shape` as a DTensor of the same memory, with mesh and placements of
    `parameter`.
    """
    if not isinstance(parameter, DTensor):
        return part
    mesh, placements = parameter.device_mesh, parameter.placements
    if part.device.type != mesh.device_type:  # offloaded: from_local would copy it to the device of the mesh
        mesh = on_cpu(mesh)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


ALL = slice(None)
_ON_CPU, _ON_GPU = 1 << 16, 1 << 23
"""Elements that are updated at a time: on a CPU what fits its caches, on a GPU some 300 MiB."""


def wide(tensor: Tensor) -> Tensor:
    """In fp32 at least; the same memory if it is that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def rows(tensor: Tensor) -> Tensor:
    """A view of (rows, elements of a row)."""
    return tensor.view(-1, tensor.shape[-1]) if tensor.dim() else tensor.view(1, 1)


def chunks(of_rows: Tensor) -> Iterator[slice]:
    """Slices of rows that are updated at a time, so that an update needs little memory."""
    most = _ON_CPU if of_rows.device.type == "cpu" else _ON_GPU
    size = max(1, most // max(1, of_rows.shape[1]))
    for start in range(0, len(of_rows), size):
        yield slice(start, start + size)


def rest_of_division(gradients: Sequence[Tensor], divide: Tensor) -> Tensor:
    """What torch's kernels are to divide by, in fp32, as they want it; divides by an fp64 number at once."""
    if divide.dtype != torch.float64:
        return divide
    torch._foreach_div_(list(gradients), divide)
    return torch.ones_like(divide, dtype=torch.float32)


def decay_of(name: str, dimensions: int, *, settings: OptimConfig) -> float:
    """The weight decay of a parameter: of optim.rules, or optim.weight_decay for a matrix that optim.no_decay
    does not match.
    """
    if (named := _rule(name, settings).get("weight_decay")) is not None:
        return float(named)
    return settings.weight_decay if dimensions > 1 and not matches(name, settings.no_decay) else 0.0


def rate_of(name: str, *, settings: OptimConfig) -> float:
    """The learning rate of a parameter, relative to optim.lr."""
    named = _rule(name, settings).get("lr")
    return 1.0 if named is None else float(named) / settings.lr


def _rule(name: str, settings: OptimConfig) -> Mapping[str, Any]:
    """The first of optim.rules that matches."""
    return next((rule for rule in settings.rules if matches(name, [rule["match"]])), {})


def groups(named: Sequence[tuple[str, int, nn.Parameter]], settings: OptimConfig) -> list[dict[str, Any]]:
    """Parameter groups for torch's optimizers, one for each rate and weight decay, from (name, dimensions,
    parameter). `factor`: of optim.lr.
    """
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, dimensions, parameter in named:
        key = rate_of(name, settings=settings), decay_of(name, dimensions, settings=settings)
        found.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "factor": factor}
        | ({"lr": settings.lr * factor} if factor != 1 else {})
        for (factor, decay), parameters in sorted(found.items(), key=lambda each: each[0], reverse=True)
    ]


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of this step in all groups; each has a `factor`, or is a user's own."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("factor", 1.0)


class Update:
    """Base class of optimizers over shards: sets their gradients before a step and frees them afterwards."""

    optimizer: torch.optim.Optimizer | None
    """torch's optimizer; None on a rank without trained parameters."""

    def __init__(self, shards: list[LocalShard]):
        self.shards = shards
        self.watch: list[Callable[[], None]] = []
        """Called once, when the gradients of the next step are reduced; they are still scaled."""

    def begin(self) -> list[Tensor]:
        """Set the gradient of each shard; returns the gradients that exist."""
        watch, self.watch = self.watch, []
        for call in watch:
            call()
        for item in self.shards:
            gradient = item.parameter.grad
            item.shard.grad = None if gradient is None else local(gradient).to(item.shard.device)
        return [item.shard.grad for item in self.shards if item.shard.grad is not None]

    def free(self) -> None:
        for item in self.shards:
            item.parameter.grad = item.shard.grad = None

    def step(self, *, lr: float, divide: Tensor, skip: Tensor) -> None:
        raise NotImplementedError

    def wanted(self, item: LocalShard, *, before: Tensor) -> Tensor | None:  # noqa: ARG002
        """What the last update would have added to a shard without rounding, fp32; None if not known.
        `before`: its weights before.
        """
        return None

    def exact(self, item: LocalShard, part: slice) -> Tensor:
        """Rows of a shard's weights in fp32 or fp64, as the next update begins with them."""
        return wide(rows(item.shard.detach())[part])

    def state(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def copy_state(self, source: LocalShard, target: LocalShard) -> None:
        raise NotImplementedError

    def prepare(self, stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Called before a checkpoint is loaded. `stored`: key -> dtype and whole shape."""

    def adopt(self, loaded: Mapping[str, Tensor]) -> None:
        """Called after a checkpoint was loaded into the tensors of `state`."""
