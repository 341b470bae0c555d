"""The marker of a complete checkpoint: `complete.json`, which lists every file with its size and CRC32.

It is written last, into the folder `step-N.partial`; renaming that folder to
`step-N` completes the checkpoint.
"""

from __future__ import annotations

import json
import os
import stat
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridtrain.errors import UserError, refusal
from hybridtrain.models import tokens
from hybridtrain.runtime.files import is_inside, write_atomically
from hybridtrain.types import Progress

MARKER = "complete.json"
PROGRESS = "progress.json"
METADATA = ".metadata"
CONFIG = "config.json"
"""The model's config.json when the checkpoint was written. Not in checkpoints of version 0.1."""
PARTIAL = ".partial"
"""Suffix of a folder that is being written, or was when a process crashed."""
TOKENIZER = "tokenizer"
"""Folder of the data's tokenizer, in <run>/model and in a checkpoint. Not in those of version 0.1."""
DATA = "data.json"
"""File in TOKENIZER, written last: which data the tokenizer is of."""
REMOVED = ".removed"
"""Suffix of a folder that is being removed, or was when a process crashed."""
FORMAT = 1
_BLOCK = 1 << 22  # 4 MiB reads: large enough that CRC32 runs at memory speed


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and CRC32 of one file."""

    size: int
    crc32: int


_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


def measure(file: Path) -> FileRecord:
    """Size and CRC32 of `file`, which is read once. Raises OSError."""
    size = crc = 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return FileRecord(size, crc)


def is_complete(path: Path) -> bool:
    """Whether `path` was completed as a checkpoint.

    Damage since then is not checked here but reported by `verify`.
    """
    return (path / MARKER).is_file()


def write(path: Path, *, progress: Progress, files: Mapping[str, FileRecord]) -> None:
    """Write progress.json, then the marker, which lists `files` and those written here.

    All are on disk on return. config.json, generation_config.json and the tokenizer of <run>/model are copied
    into the checkpoint, so that an export does not depend on files that may be edited. Raises OSError.
    """
    content = {
        "step": progress.step,
        "tokens_seen": progress.tokens_seen,
        "fingerprints": dict(progress.fingerprints),
        **({"states": dict(progress.states)} if progress.states else {}),
    }
    _write_json(path / PROGRESS, content)
    own, model = [METADATA, PROGRESS], path.parent.parent / "model"
    kept = [DATA, *tokens.files_of(model / TOKENIZER)] if (model / TOKENIZER / DATA).is_file() else []
    for name in (CONFIG, tokens.GENERATION, *(f"{TOKENIZER}/{name}" for name in kept)):
        if (model / name).is_file():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path / name, (model / name).read_bytes())
            own.append(name)
    everything = {**files, **{name: measure(path / name) for name in own}}
    listed = {
        name: {"size": record.size, "crc32": f"{record.crc32:08x}"}
        for name, record in sorted(everything.items())
    }
    for folder in {(path / name).parent for name in own}:
        sync_folder(folder)
    _write_json(path / MARKER, {"format": FORMAT, "files": listed})
    sync_folder(path)


def read(path: Path) -> dict[str, FileRecord]:
    """The files that the marker lists.

    Raises UserError if `path` is no complete checkpoint or its marker cannot be read.
    """
    if not path.is_dir():
        raise refusal(
            "checkpoint",
            path,
            "no such folder",
            allowed="a checkpoint folder",
            instead="a folder under <run>/checkpoints",
        )
    if not is_complete(path):
        raise refusal(
            "checkpoint",
            path,
            f"incomplete: it has no {MARKER}, so writing it was interrupted",
            allowed="a complete checkpoint",
            instead="another folder beside it; resuming chooses the newest complete one by itself",
        )
    try:
        content = json.loads((path / MARKER).read_bytes())
        version = content["format"]
        files = {
            name: FileRecord(int(entry["size"]), int(entry["crc32"], 16))
            for name, entry in content["files"].items()
        }
    except _UNREADABLE as error:
        raise damaged(path, MARKER, f"it cannot be read ({error})") from error
    if version != FORMAT:
        raise refusal(
            "checkpoint",
            path,
            f"written in format {version}",
            allowed=f"format {FORMAT}",
            instead="the release of hybridtrain that wrote it",
        )
    for name in files:
        if not is_inside(name):
            raise damaged(path, MARKER, f"it lists {name!r}, which is outside the checkpoint")
    for name in (METADATA, PROGRESS):
        if name not in files:
            raise damaged(path, MARKER, f"it does not list {name}")
    return files


def check_sizes(path: Path, *, files: Iterable[tuple[str, FileRecord]]) -> None:
    """Check, without reading them, that all `files` exist and have their size.

    Raises UserError for the first that does not.
    """
    for name, record in files:
        try:
            status = (path / name).stat()
        except OSError:
            status = None
        if status is None or not stat.S_ISREG(status.st_mode):
            raise damaged(path, name, "it is missing")
        if status.st_size != record.size:
            raise damaged(path, name, f"it has {status.st_size} bytes instead of {record.size}")


def verify(path: Path, *, files: Iterable[tuple[str, FileRecord]]) -> None:
    """Check that all `files` exist and have their size and CRC32.

    Raises UserError for the first that does not.
    """
    for name, record in files:
        check_sizes(path, files=[(name, record)])
        if measure(path / name).crc32 != record.crc32:
            raise damaged(path, name, "its content has changed (CRC32 differs)")


def read_progress(path: Path) -> Progress:
    """Step, tokens seen, fingerprints and small states of a complete checkpoint.

    Raises UserError if progress.json cannot be read.
    """
    try:
        content = json.loads((path / PROGRESS).read_bytes())
        return Progress(
            int(content["step"]),
            int(content["tokens_seen"]),
            {str(k): str(v) for k, v in content["fingerprints"].items()},
            {str(k): dict(v) for k, v in content.get("states", {}).items()},
        )
    except (*_UNREADABLE, FileNotFoundError) as error:
        raise damaged(path, PROGRESS, f"it cannot be read ({error})") from error


def free_name(path: Path, *, ending: str) -> Path:
    """The first free name of step-N + ending, step-N.2 + ending ...: a folder that could not be removed may
    have the first one.
    """
    aside, number = path.with_name(path.name + ending), 1
    while aside.exists() or aside.is_symlink():
        number += 1
        aside = path.with_name(f"{path.name}.{number}{ending}")
    return aside


def damaged(path: Path, name: str, problem: str) -> UserError:
    """The refusal of a damaged checkpoint. `name`: the damaged file."""
    return refusal(
        "checkpoint",
        path,
        f"damaged: {name}: {problem}",
        allowed="a checkpoint as it was written",
        instead=(
            "restore the file, or remove this folder: resuming then uses the newest complete one that is left"
        ),
    )


def sync_folder(path: Path) -> None:
    """fsync a folder, so that new names and renames in it are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_json(file: Path, content: Any) -> None:
    with file.open("w") as stream:
        json.dump(content, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
