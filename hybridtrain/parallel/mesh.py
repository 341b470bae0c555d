"""The process group, the device and the mesh of named axes; and agreement of flags across ranks.

Every axis of the layout is a dimension of one DeviceMesh, also those of degree 1, so that no part asks whether an axis exists.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from hybridtrain.errors import Answered, UserError
from hybridtrain.runtime import launch, log, meeting, network

if TYPE_CHECKING:
    from hybridtrain.plan.layout import ParallelLayout


def device() -> torch.device:
    """This rank's GPU where there is one, else the CPU. Where each process sees one GPU only, that one is its own."""
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK") or os.environ.get("RANK") or 0)
        return torch.device("cuda", local % torch.cuda.device_count())
    return torch.device("cpu")


def connect(device: torch.device, *, timeout_s: int) -> None:
    """Join the process group that the launcher describes, or make one of a single process. CPU collectives always work.

    Raises UserError for processes that cannot meet or whose network does not carry a sum, Answered on ranks that have nothing to add.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")  # connections are made when they are used: a group of N ranks is not N x N sockets
    _allow_files()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout_s)}
    if device.type == "cuda":
        options["device_id"] = device  # NCCL connects once, now, and splits that communicator into those of the mesh
    if not launch.several():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **options)
        return
    met = meeting.meet(gpu=str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "", timeout_s=timeout_s)
    if met.hosts > 1:
        network.choose_card(met.address)
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
    """The DeviceMesh of a layout and the groups that the engine needs. In every one a collective fails after `timeout_s`."""

    def __init__(self, layout: ParallelLayout, *, device: torch.device, timeout_s: int):
        names, degrees = zip(*layout.axes(), strict=True)
        self.layout, self.device, self.timeout = layout, device, timedelta(seconds=timeout_s)
        self.whole: DeviceMesh = init_device_mesh(device.type, degrees, mesh_dim_names=names)
        self.coordinates = layout.coordinates(dist.get_rank())
        self.tp = self.whole["tp"]
        self.data = self.whole["dp_replicate", "dp_shard"] if layout.dp_replicate > 1 else self.whole["dp_shard"]
        self.groups = {name: self._timed(self.whole[name].get_group()) for name in names}
        self.loss_group = self.flat("pp", "dp_replicate", "dp_shard", name="loss")
        """Ranks with the same tp coordinate: a sum over it counts each micro-batch of each stage once."""
        self.control_group = self.new_group(None, backend="gloo")
        """All ranks, on the CPU: flags and objects, from the main thread only."""
        self.checkpoint_group = self.new_group(None, backend="gloo")
        """All ranks, on the CPU, for the thread that writes checkpoints: sharing a group would mix its messages with flags."""

    def new_group(self, ranks: list[int] | None, *, backend: str | None) -> dist.ProcessGroup:
        """A group of `ranks` (None: all) over `backend` (None: that of the default group); every rank of the world makes it."""
        return dist.new_group(ranks, timeout=self.timeout, backend=backend)

    def flat(self, *axes: str, name: str) -> dist.ProcessGroup:
        """The ranks that differ in these axes alone, as one group (collective)."""
        return self._timed(self.whole[axes]._flatten(name).get_group())

    def _timed(self, group: dist.ProcessGroup) -> dist.ProcessGroup:
        """`group`, with our timeout: DeviceMesh makes its groups with torch's own."""
        dist.distributed_c10d._set_pg_timeout(self.timeout, group)
        return group

    @property
    def dp_rank(self) -> int:
        """Which share of the global batch this rank reads."""
        return self.coordinates["dp_replicate"] * self.layout.dp_shard + self.coordinates["dp_shard"]

    def group(self, axis: str) -> dist.ProcessGroup:
        return self.groups[axis]

    def ends_group(self) -> dist.ProcessGroup | None:
        """First and last pipeline rank with otherwise equal coordinates (for tied weights); None on ranks between them."""
        pp = self.layout.pp
        ranks = self.whole.mesh.reshape(pp, -1)
        mine = None
        for column in range(ranks.shape[1]):
            pair = [int(ranks[0, column]), int(ranks[pp - 1, column])]
            group = self.new_group(pair, backend=None)
            if dist.get_rank() in pair:
                mine = group
        return mine


def sharded_over(tensor: Tensor) -> set[str]:
    """The mesh axes over which a tensor is sharded; of a plain tensor none."""
    if not isinstance(tensor, DTensor):
        return set()
    names = tensor.device_mesh.mesh_dim_names or ()
    # not is_shard(): it is False for the _StridedShard that fully_shard makes of a tensor-parallel parameter
    return {name for name, placement in zip(names, tensor.placements, strict=True) if not placement.is_replicate()}


def any_rank(flags: list[bool], *, group: dist.ProcessGroup | None) -> list[bool]:
    """For each flag, whether it is set on any rank of a CPU group."""
    values = torch.tensor(flags, dtype=torch.int32)
    if dist.is_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return [bool(value) for value in values]


def from_rank0(value: Any, *, group: dist.ProcessGroup | None) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def on_rank0(call: Callable[[], Any], *, group: dist.ProcessGroup | None) -> Any:
    """What `call` returns on rank 0, on every rank. What it raises is raised on rank 0; the others leave without words (Answered)."""
    outcome: tuple[Any, int | None] = (None, None)
    raised: BaseException | None = None
    if log.rank() == 0:
        try:
            outcome = (call(), None)
        except BaseException as error:  # the others must not wait for it
            raised = error
            outcome = (None, error.code if isinstance(error, Answered) else 2 if isinstance(error, UserError) else 1)
    value, code = from_rank0(outcome, group=group)
    if raised is not None:
        raise raised
    if code is not None:
        raise Answered(code)
    return value


def gathered(value: Any, *, group: dist.ProcessGroup | None) -> list[Any]:
    """Every rank's value, on rank 0; empty on the others (collective, objects)."""
    if not dist.is_initialized():
        return [value]
    world: list[Any] | None = [None] * dist.get_world_size(group) if dist.get_rank() == 0 else None
    dist.gather_object(value, world, dst=0, group=group)
    return world or []
