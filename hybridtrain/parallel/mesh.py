"""The process group, the device, the process groups of a layout's axes, and exchange of
Python objects between ranks.

axes of the layout  ->  one group for each axis of a degree above 1, and for each product in PRODUCTS
                    ->  a DeviceMesh of the same groups, for DTensor and fully_shard
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from hybridtrain.errors import ReportedElsewhere, UserError
from hybridtrain.plan.layout import AXES, ParallelLayout
from hybridtrain.runtime import launch, log, network, rendezvous

PRODUCTS = {
    "data": ("dp_replicate", "dp_shard"),
    "loss": ("pp", "dp_replicate", "dp_shard", "cp"),
    "stage": ("dp_replicate", "dp_shard", "cp", "tp"),
    "world": AXES,
}
"""Sets of axes. data: ranks with different rows; loss: all but tp, to sum losses; stage: the ranks
of one pipeline stage."""


def device() -> torch.device:
    """This rank's GPU, else the CPU. If each process sees only one GPU, that one."""
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK") or os.environ.get("RANK") or 0)
        return torch.device("cuda", local % torch.cuda.device_count())
    return torch.device("cpu")


def connect(device: torch.device, *, timeout_s: int) -> None:
    """Initialize the process group of the launcher, or one of a single process. CPU collectives always work.

    Raises UserError if the processes cannot connect or a first all-reduce fails, ReportedElsewhere on ranks
    whose error another rank reports.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s))
        return
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")  # connects on first use: fewer sockets than N x N
    _allow_files()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout_s)}
    if device.type == "cuda":
        options["device_id"] = device  # NCCL connects now, and the mesh splits this communicator
    if not launch.is_launched():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **options)
        return
    joined = rendezvous.join(
        gpu=str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "",
        timeout_s=timeout_s,
    )
    if joined.hosts > 1:
        network.choose_interface(joined.address)
    rank, world_size = log.rank(), int(os.environ["WORLD_SIZE"])
    try:
        dist.init_process_group(backend, store=joined.store, rank=rank, world_size=world_size, **options)
        total = torch.tensor(rank)
        dist.all_reduce(total)
        assert int(total) == world_size * (world_size - 1) // 2, f"a sum over ranks gave {int(total)}"
    except RuntimeError as error:
        raise network.unfit(error) from error
    if rank == 0:
        joined.clear()


def _allow_files() -> None:
    """Raise this process's limit of open files and sockets to the system's maximum."""
    if sys.platform != "win32":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def disconnect() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Mesh:
    """The process groups of a layout, and the DeviceMesh of the same groups for DTensor and fully_shard.

    An axis of degree 1 has no group; products with the same ranks share one. Collectives
    time out after `timeout_s`.
    """

    def __init__(self, layout: ParallelLayout, *, device: torch.device, timeout_s: int):
        self.layout, self.device, self.timeout = layout, device, timedelta(seconds=timeout_s)
        self.coordinates = layout.coordinates(dist.get_rank())
        self._ranks = torch.arange(layout.world_size).view([degree for _, degree in layout.axes()])
        self._groups: dict[tuple[str, ...], dist.ProcessGroup] = {}
        for name in (*AXES, "loss", "world"):
            self.group(name)
        self.checkpoint_group = self.all_ranks(name="checkpoint") if layout.world_size > 1 else None
        """All ranks over gloo, for the thread that writes checkpoints: two threads must not share a group."""

    def group(self, name: str) -> dist.ProcessGroup | None:
        """This rank's group along an axis or a product; None if it has only this rank.

        The first call is collective.
        """
        axes = tuple(axis for axis in PRODUCTS.get(name, (name,)) if self.layout.degree(axis) > 1)
        if axes and axes not in self._groups:
            self._groups[axes] = self._along(axes, name=name)
        return self._groups.get(axes)

    def all_ranks(self, *, name: str) -> dist.ProcessGroup:
        """A new group of all ranks over gloo (collective)."""
        group = self._new(None, name=name)
        assert group is not None
        return group

    def sum(self, tensor: Tensor, *, over: str) -> None:
        """All-reduce a tensor on the device in place, over an axis or a product."""
        if (group := self.group(over)) is not None:
            dist.all_reduce(tensor, group=group)

    def is_first(self, axes: set[str]) -> bool:
        """Whether this rank is the first of its stage with its part of a tensor sharded over `axes`."""
        return all(self.coordinates[axis] == 0 for axis in PRODUCTS["stage"] if axis not in axes)

    def embedding_group(self) -> dist.ProcessGroup | None:
        """The first and the last pipeline rank of this rank's pipeline, for tied weights; None on
        the ranks between (collective).
        """
        if self.layout.pp == 2:
            return self.group("pp")
        return self._new(self._ranks[:: self.layout.pp - 1].flatten(1).t().tolist(), name="embedding")

    @functools.cached_property
    def device_mesh(self) -> DeviceMesh:
        """A DeviceMesh of the axes with a group, and of dp_shard, which fully_shard needs even
        with degree 1 (collective).
        """
        axes = [axis for axis in AXES if self.layout.degree(axis) > 1 or axis == "dp_shard"]
        groups = [self.group(axis) or self._along((axis,), name=axis) for axis in axes]
        ranks = self._ranks.view([self.layout.degree(axis) for axis in axes])
        return DeviceMesh.from_group(groups, self.device.type, ranks, mesh_dim_names=tuple(axes))

    @property
    def tp(self) -> DeviceMesh:
        return self.device_mesh["tp"]

    @property
    def data(self) -> DeviceMesh:
        return self.device_mesh[
            tuple(axis for axis in PRODUCTS["data"] if axis in (self.device_mesh.mesh_dim_names or ()))
        ]

    @property
    def dp_rank(self) -> int:
        """Index of this rank's share of the global batch."""
        return self.coordinates["dp_replicate"] * self.layout.dp_shard + self.coordinates["dp_shard"]

    def _along(self, axes: tuple[str, ...], *, name: str) -> dist.ProcessGroup:
        """This rank's group of the ranks that differ only in `axes`."""
        last = self._ranks.movedim([AXES.index(axis) for axis in axes], list(range(-len(axes), 0)))
        group = self._new(last.reshape(-1, math.prod(last.shape[-len(axes) :])).tolist(), name=name)
        assert group is not None
        return group

    def _new(self, ranks: list[list[int]] | None, *, name: str) -> dist.ProcessGroup | None:
        """Create disjoint groups of `ranks`, and return this rank's; None: one gloo group of all ranks
        (collective over all ranks).
        """
        options: dict[str, Any] = {"timeout": self.timeout, "group_desc": name}
        world = dist.group.WORLD
        assert world is not None
        if ranks is None:
            return dist.new_group(backend="gloo", **options)
        if len(ranks[0]) == world.size():
            return world
        if world.bound_device_id is not None:  # NCCL splits its communicator into all groups at once
            return dist.split_group(split_ranks=ranks, **options)
        groups = [dist.new_group(members, **options) for members in ranks]
        return next(
            (group for group, members in zip(groups, ranks, strict=True) if dist.get_rank() in members), None
        )


def sharded_over(tensor: Tensor) -> set[str]:
    """The mesh axes over which a tensor is sharded; empty for a plain tensor."""
    if not isinstance(tensor, DTensor):
        return set()
    names = tensor.device_mesh.mesh_dim_names or ()
    # not is_shard(), which is False for the _StridedShard of tensor-parallel parameters under fully_shard
    return {
        name for name, placement in zip(names, tensor.placements, strict=True) if not placement.is_replicate()
    }


def any_rank(flags: list[bool]) -> list[bool]:
    """For each flag, whether it is set on any rank (collective, on the CPU)."""
    values = torch.tensor(flags, dtype=torch.int32)
    if dist.is_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [bool(value) for value in values]


def from_rank0(value: Any) -> Any:
    """Broadcast rank 0's value, a picklable object, to all ranks (collective)."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def on_rank0(call: Callable[[], Any]) -> Any:
    """Call on rank 0, and return the result on all ranks (collective).

    An exception is raised on rank 0, ReportedElsewhere on the others.
    """
    outcome: tuple[Any, int | None] = (None, None)
    raised: BaseException | None = None
    if log.rank() == 0:
        try:
            outcome = (call(), None)
        except BaseException as error:  # so that the others do not wait
            raised = error
            outcome = (
                None,
                error.code
                if isinstance(error, ReportedElsewhere)
                else 2
                if isinstance(error, UserError)
                else 1,
            )
    value, code = from_rank0(outcome)
    if raised is not None:
        raise raised
    if code is not None:
        raise ReportedElsewhere(code)
    return value


def gather_on_rank0(value: Any) -> list[Any]:
    """The values of all ranks, picklable objects, on rank 0; empty on the others (collective)."""
    if not dist.is_initialized():
        return [value]
    world: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, world, dst=0)
    return world or []
