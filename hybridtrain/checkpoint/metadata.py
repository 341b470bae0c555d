"""Reads torch DCP's `.metadata` without trusting it.

The file is a pickle. The unpickler here allows only the classes that the metadata of tensors
consists of, so that opening a checkpoint never runs code from it. DCP reads the tensor files
with `torch.load(weights_only=True)`; entries of bytes, which DCP would unpickle without
restrictions, are refused here.
"""

from __future__ import annotations

import itertools
import math
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_local_load_plan
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from hybridtrain.checkpoint import marker
from hybridtrain.checkpoint.fragments import Fragment
from hybridtrain.errors import UserError

# DCP warns if a single process saves or loads, which is intended here.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

_CLASSES: dict[tuple[str, str], object] = {
    (dcp_metadata.__name__, name): getattr(dcp_metadata, name)
    for name in (
        "Metadata",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    # a look-up in a table of layouts
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
}


_MOST_DIMS = 8


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) in _CLASSES:
            return _CLASSES[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(
            f"it names {module}.{name}, which the metadata of tensors has no use for"
        )


class _Reader(dcp.FileSystemReader):
    """DCP's reader with metadata that has been read and checked already."""

    def __init__(self, path: Path, *, metadata: dcp_metadata.Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> dcp_metadata.Metadata:
        return self._metadata


def read(path: Path) -> dcp_metadata.Metadata:
    """The checked metadata of the checkpoint at `path`.

    Raises UserError if it is not the metadata of complete tensors.
    """
    try:
        with (path / marker.METADATA).open("rb") as stream:
            content = _Unpickler(stream).load()
        _check(content, path=path)
        return content
    except (OSError, UserError):
        raise
    except Exception as error:  # a crafted pickle can raise anything
        raise _refusal(path, str(error)) from error


class _LoadPlanner(DefaultLoadPlanner):
    """DCP's load planner, which also reads into fragments, chunk by chunk."""

    def __init__(self, tensors: Mapping[str, torch.Tensor | Fragment]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.tensors = tensors

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        """Replaces torch's method, which sets values that are not tensors to None."""
        self.original_state_dict = state_dict
        self.state_dict, self.metadata, self.is_coordinator = dict(self.tensors), metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        fragments = {key: value for key, value in self.state_dict.items() if isinstance(value, Fragment)}
        others = {key: value for key, value in self.state_dict.items() if key not in fragments}
        assert self.metadata is not None
        entries: dict[str, Any] = self.metadata.state_dict_metadata
        items = create_default_local_load_plan(others, self.metadata, strict=True).items
        for key, fragment in fragments.items():
            items += create_read_items_for_chunk_list(key, entries[key], fragment.chunks())
        return LoadPlan(items)

    def lookup_tensor(self, index: dcp_metadata.MetadataIndex) -> torch.Tensor:
        value = self.state_dict[index.fqn]
        return value.lookup(index) if isinstance(value, Fragment) else super().lookup_tensor(index)


def load_into(
    tensors: Mapping[str, torch.Tensor | Fragment],
    *,
    path: Path,
    metadata: dcp_metadata.Metadata,
    group: dist.ProcessGroup | None,
) -> None:
    """Fill `tensors` in place, under any layout (collective over `group`; None: this process alone).

    Raises UserError if a tensor file does not hold the tensor that the metadata describes.
    """
    planner = _LoadPlanner(tensors)
    try:
        with warnings.catch_warnings():
            # An export uses `no_dist`.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(
                dict(tensors),
                storage_reader=_Reader(path, metadata=metadata),
                planner=planner,
                process_group=group,
                no_dist=group is None,
            )
    except dcp.CheckpointException as error:
        rank, (cause, _) = next(iter(sorted(error.failures.items())))
        if isinstance(cause, (pickle.UnpicklingError, OSError, EOFError)):
            raise marker.damaged(
                path, "tensor files", f"rank {rank}: {type(cause).__name__}: {str(cause).splitlines()[0]}"
            ) from None
        raise RuntimeError(f"loading {path} failed on rank {rank}: {cause!r}") from error


def _check(content: object, *, path: Path) -> None:
    """Refuse well-formed content that is not the metadata of tensors in files of this folder."""

    def expect(holds: bool, problem: str) -> None:
        if not holds:
            raise _refusal(path, problem)

    expect(isinstance(content, dcp_metadata.Metadata), "it holds something else")
    assert isinstance(content, dcp_metadata.Metadata)
    entries, storage = getattr(content, "state_dict_metadata", None), getattr(content, "storage_data", None)
    expect(isinstance(entries, dict) and isinstance(storage, dict), "it has no entries")
    assert isinstance(entries, dict)
    assert isinstance(storage, dict)
    for info in storage.values():
        expect(isinstance(info, filesystem._StorageInfo), "an entry has no place in a file")
        name = info.relative_path
        expect(
            isinstance(name, str) and Path(name).name == name, f"an entry lies outside the checkpoint: {name}"
        )
        expect(info.transform_descriptors is None, "an entry wants its file transformed")
    for key, entry in entries.items():
        expect(isinstance(entry, dcp_metadata.TensorStorageMetadata), f"{key} is not a tensor")
        expect(
            isinstance(entry.size, torch.Size) and isinstance(entry.properties.dtype, torch.dtype),
            f"{key} has no shape or dtype",
        )
        expect(_tiled(entry), f"{key} is not whole: its parts leave a hole, or overlap")
        expect(
            all(dcp_metadata.MetadataIndex(key, chunk.offsets) in storage for chunk in entry.chunks),
            f"a part of {key} is in no file",
        )


def _tiled(entry: dcp_metadata.TensorStorageMetadata) -> bool:
    """Whether the chunks cover every element of the tensor exactly once, in time linear in their number.

    If every corner of a chunk that is no corner of the tensor belongs to an even number of chunks, then the
    number of chunks that cover an element is odd inside the tensor and even outside. If the volumes add up to
    that of the tensor, too, these numbers are one and zero.
    """
    dims = len(entry.size)
    chunks = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
    if dims > _MOST_DIMS or any(
        len(offsets) != dims or len(sizes) != dims or min(offsets + sizes, default=0) < 0
        for offsets, sizes in chunks
    ):
        return False
    if sum(math.prod(sizes) for _, sizes in chunks) != math.prod(entry.size):
        return False
    odd: set[tuple[int, ...]] = set()
    for offsets, sizes in [*chunks, ((0,) * dims, tuple(entry.size))]:
        for corner in itertools.product(
            *((offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
        ):
            odd ^= {corner}
    return not odd


def _refusal(path: Path, problem: str) -> UserError:
    return marker.damaged(path, marker.METADATA, f"refused: {problem}")
