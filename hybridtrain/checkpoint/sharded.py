"""Saves and loads sharded tensors with torch DCP, under any layout.

A checkpoint is a flat mapping of keys to whole tensors. Each rank passes what it has: a plain tensor is the
same on every rank that passes it, a DTensor or a Fragment is this rank's part; pipeline stages pass different
keys. Only tensors are written (DCP would pickle anything else), besides `progress.json` and the marker.

Saving, per rank:  stage (CPU copy) -> [thread: DCP write and fsync -> size and CRC32 -> rank 0: marker,
                   rename]
The thread uses its own gloo group, so that training goes on meanwhile; it never touches a device or a mesh.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.planner_helpers import _create_write_items
from torch.distributed.tensor import DTensor

from hybridtrain.checkpoint import marker, metadata
from hybridtrain.checkpoint.fragments import Fragment
from hybridtrain.errors import UserError, refusal
from hybridtrain.runtime.files import discard
from hybridtrain.types import Progress, Saving

T = TypeVar("T")
_NAMED = 5  # keys that a message names before "and N more"


def save(
    tensors: Mapping[str, torch.Tensor | Fragment],
    *,
    path: Path,
    progress: Progress,
    group: dist.ProcessGroup | None,
    asynchronous: bool,
) -> Saving:
    """Start writing a checkpoint to `path` (collective over `group`, a gloo group of all ranks
    that nothing else uses).

    With `asynchronous`, the values at the time of the call are saved: the caller may change the tensors at
    once, but must not start another save or load over `group` before this one ends. Errors, such as a full
    disk, are raised by poll and result on every rank, as a UserError that names the rank. Earlier
    checkpoints are not changed.
    """
    staged = {key: _stage(key, tensor, copy=asynchronous) for key, tensor in tensors.items()}
    saving = _Saving(lambda: _write(staged, path=path, progress=progress, group=group))
    if not asynchronous:
        saving.wait()
    return saving


def load(
    tensors: Mapping[str, torch.Tensor | Fragment], *, path: Path, group: dist.ProcessGroup | None
) -> Progress:
    """Fill `tensors` in place from the complete checkpoint at `path`, written by any
    layout (collective over `group`).

    Every file is checked first. Raises UserError on every rank if the checkpoint is incomplete or
    damaged, lacks a key, has a different shape, or has `model.` keys that no rank requests (a
    checkpoint of another model).
    """
    assert not any(isinstance(tensor, torch.Tensor) and tensor.is_meta for tensor in tensors.values()), (
        "load fills tensors in place; meta tensors have no place"
    )
    rank, size = _rank_and_size(group)

    def read() -> tuple[Progress, list[str], metadata.dcp_metadata.Metadata]:
        files = sorted(marker.read(path).items())
        marker.verify(path, files=files[rank::size])
        stored = metadata.read(path)
        _check_shapes(tensors, stored=stored, path=path)
        return marker.read_progress(path), sorted(key for key in tensors if key.startswith("model.")), stored

    own, failure = _attempt(read, rank=rank, path=path, doing="read")
    replies = _gather((failure, own[1] if own else []), group=group)
    _raise_first([reply[0] for reply in replies])
    assert own is not None
    progress, _, stored = own
    requested = {key for _, keys in replies for key in keys}
    surplus = sorted(
        key for key in stored.state_dict_metadata if key.startswith("model.") and key not in requested
    )
    if surplus:
        raise _of_another_model(path, f"it also holds {_some(surplus)}")
    metadata.load_into(tensors, path=path, metadata=stored, group=group)
    return progress


def stored_keys(path: Path) -> frozenset[str]:
    """The keys in a complete checkpoint."""
    return frozenset(stored(path))


def stored(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Key -> (dtype, whole shape) of a complete checkpoint.

    Raises UserError if its marker or metadata cannot be read.
    """
    marker.read(path)
    entries = metadata.read(path).state_dict_metadata  # tensors only: `read` refuses others
    return {key: (entry.properties.dtype, tuple(entry.size)) for key, entry in entries.items()}  # type: ignore[union-attr]


# --- saving -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Staged:
    """This rank's part of one tensor on the CPU, with DCP's description of its place in the whole tensor."""

    items: list[WriteItem]
    part: torch.Tensor | Fragment


def _stage(key: str, tensor: torch.Tensor | Fragment, *, copy: bool) -> _Staged:
    """The local part of `tensor` on the CPU, without its mesh.

    `copy`: also copy a tensor that is on the CPU already.
    """
    if isinstance(tensor, Fragment):
        return _Staged(tensor.write_items(key), tensor.at(tensor.values.detach().to("cpu", copy=copy)))
    assert isinstance(tensor, torch.Tensor), (
        f"a checkpoint holds tensors only, {key} is a {type(tensor).__name__}"
    )
    local = tensor.detach()
    if isinstance(local, DTensor):
        local = local.to_local()
    return _Staged(_create_write_items(key, tensor.detach()), local.to("cpu", copy=copy))


class _SavePlanner(DefaultSavePlanner):
    """DCP's save planner, with the write items of the staged tensors.

    Of a tensor that several ranks have, one writes it.
    """

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([item for staged in self.state_dict.values() for item in staged.items])
        return self.plan

    def lookup_object(self, index: Any) -> torch.Tensor:
        part = self.state_dict[index.fqn].part
        return part.lookup(index) if isinstance(part, Fragment) else part


class _Writer(dcp.FileSystemWriter):
    """DCP's writer, which raises the error of the disk and keeps this machine's paths out of the metadata."""

    def __init__(self, path: Path) -> None:
        # No copy-ahead: all tensors are on the CPU, and DCP's overlapping loader would use device 0 from this
        # thread.
        super().__init__(
            path, single_file_per_rank=True, sync_files=True, thread_count=1, per_thread_copy_ahead=0
        )

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=None, save_id=self.save_id)

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:  # of torch.save's zip writer; the disk's error is its context
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


class _Saving:
    """One save, in a daemon thread: a failing process must not wait for ranks that have ended."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # raised by `poll`
            self._error = error

    def wait(self) -> None:
        self._thread.join()

    def poll(self) -> bool:
        if self._thread.is_alive():
            return False
        if self._error is not None:
            raise self._error
        return True

    def result(self) -> None:
        self.wait()
        self.poll()


def _write(
    staged: dict[str, _Staged], *, path: Path, progress: Progress, group: dist.ProcessGroup | None
) -> None:
    """Write to a temporary folder, write its marker, rename it; on an error remove it and
    raise on every rank.
    """
    rank, _ = _rank_and_size(group)
    partial = path.with_name(path.name + marker.PARTIAL)

    def prepare() -> str:
        """Create the temporary folder on rank 0; returns its name, on other ranks ""."""
        if rank != 0:
            return ""
        if partial.is_dir():
            discard(partial)  # left by a crash
        free = marker.free_name(path, ending=marker.PARTIAL)
        free.mkdir(parents=True)
        return free.name

    def measure() -> dict[str, marker.FileRecord]:
        return {file.name: marker.measure(file) for file in partial.glob(f"__{rank}_*")}

    def complete() -> None:
        if rank == 0:
            marker.write(partial, progress=progress, files=files)
            _rename(partial, path)

    try:
        partial = path.with_name(_agree(prepare, group=group, path=path)[0])
        _dcp_save(staged, path=path, partial=partial, group=group)
        files = {
            name: record for part in _agree(measure, group=group, path=path) for name, record in part.items()
        }
        _agree(complete, group=group, path=path)
    except BaseException:
        if rank == 0 and partial.is_dir():
            discard(partial)
        raise


def _dcp_save(
    staged: dict[str, _Staged], *, path: Path, partial: Path, group: dist.ProcessGroup | None
) -> None:
    try:
        dcp.save(
            dict(staged),
            storage_writer=_Writer(partial),
            planner=_SavePlanner(),
            process_group=group,
            no_dist=group is None,
        )
    except dcp.CheckpointException as error:  # raised on all ranks
        for rank, (cause, _) in sorted(error.failures.items()):
            if isinstance(cause, OSError):
                raise _disk_error(path, rank=rank, doing="write", error=cause) from None
        rank, (cause, _) = min(error.failures.items())
        raise RuntimeError(f"saving {path} failed on rank {rank}: {cause!r}") from error


def _rename(partial: Path, path: Path) -> None:
    """Complete the checkpoint by a rename.

    An older one of the same step, of a run that resumed earlier, is replaced.
    """
    replaced = marker.free_name(path, ending=marker.REMOVED)
    if path.exists() or path.is_symlink():
        os.rename(path, replaced)
    os.rename(partial, path)
    marker.sync_folder(path.parent)
    discard(replaced)


# --- loading ------------------------------------------------------------------------------------------------


def _check_shapes(
    tensors: Mapping[str, torch.Tensor | Fragment], *, stored: metadata.dcp_metadata.Metadata, path: Path
) -> None:
    entries = stored.state_dict_metadata
    missing = sorted(key for key in tensors if key not in entries)
    if missing:
        raise _of_another_model(path, f"it does not hold {_some(missing)}")
    for key, tensor in sorted(tensors.items()):
        shape = tuple(entries[key].size)  # type: ignore[union-attr]  # metadata.read allows only tensors
        if shape != tuple(tensor.shape):
            raise _of_another_model(path, f"{key} has shape {shape} there and {tuple(tensor.shape)} here")


def _of_another_model(path: Path, problem: str) -> UserError:
    return refusal(
        "checkpoint",
        path,
        f"a checkpoint of another model: {problem}",
        allowed="a checkpoint of the model in the config",
        instead="the model section of the run that wrote it, or another run.dir",
    )


def _some(keys: list[str]) -> str:
    rest = len(keys) - _NAMED
    return ", ".join(keys[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


# --- agreement between ranks
# --------------------------------------------------------------------------------------


class _Failure(NamedTuple):
    rank: int
    text: str
    of_user: bool


def _rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def _gather(value: T, *, group: dist.ProcessGroup | None) -> list[T]:
    """`value` of every rank, in rank order."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _attempt(work: Callable[[], T], *, rank: int, path: Path, doing: str) -> tuple[T | None, _Failure | None]:
    """Do this rank's `work`; returns its result, or its error in a form that can be sent to other ranks."""
    try:
        return work(), None
    except UserError as error:
        return None, _Failure(rank, str(error), True)
    except OSError as error:
        return None, _Failure(rank, str(_disk_error(path, rank=rank, doing=doing, error=error)), True)
    except Exception as error:
        return None, _Failure(rank, f"rank {rank} could not {doing} {path}: {error!r}", False)


def _raise_first(failures: list[_Failure | None]) -> None:
    """Raise the same error on every rank.

    Internal errors take precedence, so that a UserError does not hide them.
    """
    ordered = sorted(
        (failure for failure in failures if failure is not None),
        key=lambda failure: (failure.of_user, failure.rank),
    )
    if ordered:
        raise UserError(ordered[0].text) if ordered[0].of_user else RuntimeError(ordered[0].text)


def _agree(work: Callable[[], T], *, group: dist.ProcessGroup | None, path: Path) -> list[T]:
    """Do `work` on every rank and return the results of all ranks; an error on one rank is raised on all."""
    rank, _ = _rank_and_size(group)
    replies = _gather(_attempt(work, rank=rank, path=path, doing="write"), group=group)
    _raise_first([failure for _, failure in replies])
    return [value for value, _ in replies]  # type: ignore[misc]  # None only where work itself returns it


def _disk_error(path: Path, *, rank: int, doing: str, error: OSError) -> UserError:
    return refusal(
        "checkpoint",
        path,
        f"rank {rank} could not {doing} it: {error}",
        allowed="a folder that every rank can write and that has space for the checkpoint",
        instead=(
            "free some space, then give the same command again: "
            "the run continues from its newest complete checkpoint"
        ),
    )
