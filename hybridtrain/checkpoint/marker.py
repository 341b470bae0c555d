"""What makes a folder a complete checkpoint: `complete.json`, which lists every file with its size and CRC32.

It is written last, into the folder that is still called `.partial`; the rename that follows is what completes a checkpoint.
"""

from __future__ import annotations

import json
import os
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
"""The model's config.json as it was when the checkpoint was written; checkpoints of earlier releases have none."""
PARTIAL = ".partial"
"""Ending of a folder that is being written, or was when a crash came."""
TOKENIZER = "tokenizer"
"""Folder of the tokenizer of what was trained on, in <run>/model and in a checkpoint; those of earlier releases have none."""
DATA = "data.json"
"""In it, written last: which data that was."""
REMOVED = ".removed"
"""Ending of a folder that is being removed, or was when a crash came."""
FORMAT = 1
_BLOCK = 1 << 22  # 4 MiB reads: large enough that CRC32 runs at memory speed


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and CRC32 of one file."""

    size: int
    crc32: int


_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


def measure(file: Path) -> FileRecord:
    """Size and CRC32 of `file`, reading it once; raises OSError."""
    size = crc = 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return FileRecord(size, crc)


def is_complete(path: Path) -> bool:
    """Whether `path` became a complete checkpoint. Later damage is `verify`'s to notice, so that it is never passed over in silence."""
    return (path / MARKER).is_file()


def write(path: Path, *, progress: Progress, files: Mapping[str, FileRecord]) -> None:
    """Write `progress.json` and then the marker over `files` and itself, all on disk when this returns (raises OSError).

    A checkpoint of a run takes config.json, generation_config.json and the tokenizer of the run's model/ along, so that an export needs
    nothing that may be edited later.
    """
    content = {"step": progress.step, "tokens_seen": progress.tokens_seen, "fingerprints": dict(progress.fingerprints)}
    _write_json(path / PROGRESS, content)
    own, model = [METADATA, PROGRESS], path.parent.parent / "model"
    kept = [DATA, *tokens.files_of(model / TOKENIZER)] if (model / TOKENIZER / DATA).is_file() else []
    for name in (CONFIG, tokens.GENERATION, *(f"{TOKENIZER}/{name}" for name in kept)):
        if (model / name).is_file():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path / name, (model / name).read_bytes())
            own.append(name)
    everything = {**files, **{name: measure(path / name) for name in own}}
    listed = {name: {"size": record.size, "crc32": f"{record.crc32:08x}"} for name, record in sorted(everything.items())}
    for folder in {(path / name).parent for name in own}:
        sync_folder(folder)
    _write_json(path / MARKER, {"format": FORMAT, "files": listed})
    sync_folder(path)


def read(path: Path) -> dict[str, FileRecord]:
    """The files that the marker lists; UserError if `path` is no complete checkpoint or its marker cannot be read."""
    if not path.is_dir():
        raise refusal("checkpoint", path, "no such folder", allowed="a checkpoint folder", instead="a folder under <run>/checkpoints")
    if not is_complete(path):
        raise refusal(
            "checkpoint",
            path,
            f"incomplete: it has no {MARKER}, so its writing was cut short",
            allowed="a complete checkpoint",
            instead="another folder beside it; resuming chooses the newest complete one by itself",
        )
    try:
        content = json.loads((path / MARKER).read_bytes())
        version = content["format"]
        files = {name: FileRecord(int(entry["size"]), int(entry["crc32"], 16)) for name, entry in content["files"].items()}
    except _UNREADABLE as error:
        raise damaged(path, MARKER, f"it cannot be read ({error})") from error
    if version != FORMAT:
        raise refusal("checkpoint", path, f"written in format {version}", allowed=f"format {FORMAT}", instead="the release of hybridtrain that wrote it")
    for name in files:
        if not is_inside(name):
            raise damaged(path, MARKER, f"it lists {name!r}, which is outside the checkpoint")
    for name in (METADATA, PROGRESS):
        if name not in files:
            raise damaged(path, MARKER, f"it does not list {name}")
    return files


def check_sizes(path: Path, *, files: Iterable[tuple[str, FileRecord]]) -> None:
    """Check, without reading, that each of `files` is there with its size; UserError naming the first that is not."""
    for name, record in files:
        file = path / name
        if not file.is_file():
            raise damaged(path, name, "it is missing")
        if file.stat().st_size != record.size:
            raise damaged(path, name, f"it has {file.stat().st_size} bytes instead of {record.size}")


def verify(path: Path, *, files: Iterable[tuple[str, FileRecord]]) -> None:
    """Check that each of `files` is there with its size and CRC32; UserError naming the first that is not."""
    for name, record in files:
        check_sizes(path, files=[(name, record)])
        if measure(path / name).crc32 != record.crc32:
            raise damaged(path, name, "its content has changed (CRC32 differs)")


def read_progress(path: Path) -> Progress:
    """The position that a complete checkpoint was written at."""
    try:
        content = json.loads((path / PROGRESS).read_bytes())
        return Progress(int(content["step"]), int(content["tokens_seen"]), {str(k): str(v) for k, v in content["fingerprints"].items()})
    except (*_UNREADABLE, FileNotFoundError) as error:
        raise damaged(path, PROGRESS, f"it cannot be read ({error})") from error


def free_name(path: Path, *, ending: str) -> Path:
    """step-N + ending, or step-N.2 + ending ...: the first name beside `path` that nothing has. What could not be removed before stands in the way."""
    aside, number = path.with_name(path.name + ending), 1
    while aside.exists() or aside.is_symlink():
        number += 1
        aside = path.with_name(f"{path.name}.{number}{ending}")
    return aside


def damaged(path: Path, name: str, problem: str) -> UserError:
    """The refusal for a checkpoint that is not what was written."""
    return refusal(
        "checkpoint",
        path,
        f"damaged: {name}: {problem}",
        allowed="a checkpoint as it was written",
        instead="restore the file, or remove this folder: resuming then takes the newest complete one that is left",
    )


def sync_folder(path: Path) -> None:
    """Make the folder's entries (new names, renames) durable."""
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
