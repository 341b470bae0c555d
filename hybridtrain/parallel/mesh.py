"""The process group, the device and the groups of a layout's axes; and values that ranks share.

axes of the layout  ->  one group for each of a degree above 1, and for each product in PRODUCTS
                    ->  a DeviceMesh of the same groups, where DTensor or fully_shard wants one
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
"""Named sets of axes. data: ranks with rows of their own; loss: a sum over it counts each micro-batch of each stage once; stage: of one pipeline stage."""


def device() -> torch.device:
    """This rank's GPU where there is one, else the CPU. Where each process sees one GPU only, that one is its own."""
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK") or os.environ.get("RANK") or 0)
        return torch.device("cuda", local % torch.cuda.device_count())
    return torch.device("cpu")


def connect(device: torch.device, *, timeout_s: int) -> None:
    """Join the process group that the launcher describes, or make one of a single process. CPU collectives always work.

    Raises UserError for processes that cannot meet or whose network does not carry a sum, ReportedElsewhere on ranks that have nothing to add.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s))
        return
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")  # connections are made when they are used: a group of N ranks is not N x N sockets
    _allow_files()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout_s)}
    if device.type == "cuda":
        options["device_id"] = device  # NCCL connects once, now, and splits that communicator into those of the mesh
    if not launch.is_launched():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **options)
        return
    met = rendezvous.join(gpu=str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "", timeout_s=timeout_s)
    if met.hosts > 1:
        network.choose_interface(met.address)
    rank, world_size = log.rank(), int(os.environ["WORLD_SIZE"])
    try:
        dist.init_process_group(backend, store=met.store, rank=rank, world_size=world_size, **options)
        total = torch.tensor(rank)
        dist.all_reduce(total)
        assert int(total) == world_size * (world_size - 1) // 2, f"a sum over ranks gave {int(total)}"
    except RuntimeError as error:
        raise network.unfit(error) from error
    if rank == 0:
        met.clear()


def _allow_files() -> None:
    """Raise the number of files and sockets that this process may hold to what the system allows."""
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
    """The process groups of a layout, and of them the DeviceMesh that DTensor and fully_shard ask for.

    An axis of degree 1 has no group, nor has a product of such axes; products of the same ranks share one. In every group a collective
    fails after `timeout_s`.
    """

    def __init__(self, layout: ParallelLayout, *, device: torch.device, timeout_s: int):
        self.layout, self.device, self.timeout = layout, device, timedelta(seconds=timeout_s)
        self.coordinates = layout.coordinates(dist.get_rank())
        self._ranks = torch.arange(layout.world_size).view([degree for _, degree in layout.axes()])
        self._made: dict[tuple[str, ...], dist.ProcessGroup] = {}
        for name in (*AXES, "loss", "world"):
            self.group(name)
        self.checkpoint_group = self.all_ranks(name="checkpoint") if layout.world_size > 1 else None
        """All ranks over gloo, for the thread that writes checkpoints: sharing a group would mix its messages with those of the main thread."""

    def group(self, name: str) -> dist.ProcessGroup | None:
        """The ranks that differ in this axis, or in the axes of this product, alone; None: there is no other (the first call is collective)."""
        axes = tuple(axis for axis in PRODUCTS.get(name, (name,)) if self.layout.degree(axis) > 1)
        if axes and axes not in self._made:
            self._made[axes] = self._along(axes, name=name)
        return self._made.get(axes)

    def all_ranks(self, *, name: str) -> dist.ProcessGroup:
        """A further group of all ranks, over gloo (collective)."""
        group = self._new(None, name=name)
        assert group is not None
        return group

    def sum(self, tensor: Tensor, *, over: str) -> None:
        """Add up a tensor of the device in place, over an axis or a product; without another rank nothing is sent."""
        if (group := self.group(over)) is not None:
            dist.all_reduce(tensor, group=group)

    def ends(self) -> dist.ProcessGroup | None:
        """First and last pipeline rank with otherwise equal coordinates (for tied weights); None on ranks between them (collective)."""
        if self.layout.pp == 2:
            return self.group("pp")
        return self._new(self._ranks[:: self.layout.pp - 1].flatten(1).t().tolist(), name="ends")

    @functools.cached_property
    def whole(self) -> DeviceMesh:
        """The axes that have a group, and dp_shard, without which fully_shard does not wrap: of degree 1 its group is this rank (collective)."""
        axes = [axis for axis in AXES if self.layout.degree(axis) > 1 or axis == "dp_shard"]
        groups = [self.group(axis) or self._along((axis,), name=axis) for axis in axes]
        ranks = self._ranks.view([self.layout.degree(axis) for axis in axes])
        return DeviceMesh.from_group(groups, self.device.type, ranks, mesh_dim_names=tuple(axes))

    @property
    def tp(self) -> DeviceMesh:
        return self.whole["tp"]

    @property
    def data(self) -> DeviceMesh:
        return self.whole[tuple(axis for axis in PRODUCTS["data"] if axis in (self.whole.mesh_dim_names or ()))]

    @property
    def dp_rank(self) -> int:
        """Which share of the global batch this rank reads."""
        return self.coordinates["dp_replicate"] * self.layout.dp_shard + self.coordinates["dp_shard"]

    def _along(self, axes: tuple[str, ...], *, name: str) -> dist.ProcessGroup:
        """This rank's group of the ranks that differ in `axes` alone."""
        last = self._ranks.movedim([AXES.index(axis) for axis in axes], list(range(-len(axes), 0)))
        group = self._new(last.reshape(-1, math.prod(last.shape[-len(axes) :])).tolist(), name=name)
        assert group is not None
        return group

    def _new(self, ranks: list[list[int]] | None, *, name: str) -> dist.ProcessGroup | None:
        """Where every group is made: this rank's of several that do not overlap (None: all ranks, over gloo alone), by one call on every rank."""
        options: dict[str, Any] = {"timeout": self.timeout, "group_desc": name}
        world = dist.group.WORLD
        assert world is not None
        if ranks is None:
            return dist.new_group(backend="gloo", **options)
        if len(ranks[0]) == world.size():
            return world
        if world.bound_device_id is not None:  # NCCL splits the communicator that it has into all of them at once
            return dist.split_group(split_ranks=ranks, **options)
        made = [dist.new_group(members, **options) for members in ranks]
        return next((group for group, members in zip(made, ranks, strict=True) if dist.get_rank() in members), None)


def sharded_over(tensor: Tensor) -> set[str]:
    """The mesh axes over which a tensor is sharded; of a plain tensor none."""
    if not isinstance(tensor, DTensor):
        return set()
    names = tensor.device_mesh.mesh_dim_names or ()
    # not is_shard(): it is False for the _StridedShard that fully_shard makes of a tensor-parallel parameter
    return {name for name, placement in zip(names, tensor.placements, strict=True) if not placement.is_replicate()}


def any_rank(flags: list[bool]) -> list[bool]:
    """For each flag, whether it is set on any rank (collective, on the CPU)."""
    values = torch.tensor(flags, dtype=torch.int32)
    if dist.is_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [bool(value) for value in values]


def from_rank0(value: Any) -> Any:
    """Rank 0's value, on every rank (collective)."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def on_rank0(call: Callable[[], Any]) -> Any:
    """What `call` returns on rank 0, on every rank. What it raises is raised on rank 0; the others leave without words (ReportedElsewhere)."""
    outcome: tuple[Any, int | None] = (None, None)
    raised: BaseException | None = None
    if log.rank() == 0:
        try:
            outcome = (call(), None)
        except BaseException as error:  # the others must not wait for it
            raised = error
            outcome = (None, error.code if isinstance(error, ReportedElsewhere) else 2 if isinstance(error, UserError) else 1)
    value, code = from_rank0(outcome)
    if raised is not None:
        raise raised
    if code is not None:
        raise ReportedElsewhere(code)
    return value


def gather_on_rank0(value: Any) -> list[Any]:
    """Every rank's value, on rank 0; empty on the others (collective, objects)."""
    if not dist.is_initialized():
        return [value]
    world: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, world, dst=0)
    return world or []
