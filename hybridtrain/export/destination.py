"""The folder of an export: written under a temporary name, then swapped with an earlier export.

    <out>.partial    being written; locked by the writing process, so that a second export is refused
    <out>.removed    the earlier export, during the swap

Of the earlier export only our own files are replaced; files that somebody else put there are kept.
A link is followed.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hybridtrain.checkpoint import export_record, marker
from hybridtrain.checkpoint.export_record import ORIGIN
from hybridtrain.errors import UserError, refusal
from hybridtrain.models import tokens
from hybridtrain.runtime import log
from hybridtrain.runtime.files import (
    check_outside_checkpoints,
    discard,
    discard_folder,
    is_inside,
    is_temporary,
    read_object,
    read_record,
    write_json,
)

_log = log.get("model")
_PARTIAL, _REMOVED = ".partial", ".removed"
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def check(out: Path, *, field: str) -> None:
    """Refuse a folder `out`, given in `field`, with other content, or among a run's checkpoints (raises
    UserError).
    """
    check_outside_checkpoints(out, field=field)
    real = out.resolve()
    if real.exists() and not is_export(real) and not (real.is_dir() and not any(real.iterdir())):
        raise refusal(
            field,
            out,
            "it exists and is not an earlier export",
            allowed="a new or empty folder, or one that an export wrote",
            instead=f"{field}=FOLDER",
        )


def is_export(folder: Path) -> bool:
    """Whether `folder` is an export, by its record."""
    try:
        content = json.loads((folder / ORIGIN).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and bool(content.keys() & {"step", "scheme"})


def ours(folder: Path) -> set[str]:
    """Names of files in `folder` that an export wrote.

    Version 0.1 kept no list: its files are recognized by their names and index.
    """
    listed = read_record(folder, record=ORIGIN)
    if listed:
        return listed | {ORIGIN}
    shards: set[str] = set()
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        shards = {
            name
            for name in json.loads((folder / _INDEX).read_bytes())["weight_map"].values()
            if is_inside(name)
        }
    return shards | {
        ORIGIN,
        "config.json",
        tokens.GENERATION,
        "model.safetensors",
        _INDEX,
        *tokens.TOKENIZER_FILES,
    }


@contextmanager
def replacing(out: Path, *, field: str, keeps: str) -> Iterator[Path]:
    """Yield a folder to write into, which replaces `out` at the end of the block if there is no error.

    `keeps`: name of the file in it with which the folder stays after an interruption, and is then yielded as
    it is; so after a refusal of what is in `out`; empty: none. Raises OSError and UserError.
    """
    real = out.resolve()
    real.parent.mkdir(parents=True, exist_ok=True)
    partial = real.with_name(real.name + _PARTIAL)
    handle = _locked(partial, out=out, field=field, keeps=keeps)
    interrupted = written = False
    try:
        write_json(partial / ORIGIN, {})  # marks the folder as ours after a crash
        removed = real.with_name(real.name + _REMOVED)
        if not real.exists() and is_export(removed):
            os.rename(removed, real)  # an earlier export was killed between its two renames
        yield partial
        written = True
        origin = read_object(partial / ORIGIN, field=field)
        contents = {name: each for name, each in export_record.contents(partial).items() if name != keeps}
        write_json(
            partial / ORIGIN,
            {
                **origin,
                "files": sorted(path.name for path in partial.iterdir() if path.name != keeps),
                export_record.CONTENTS: contents,
            },
        )
        marker.sync_folder(partial)
        others = _others(real, partial=partial, out=out, field=field)
        if keeps:
            discard(partial / keeps)
        if real.is_dir() and (os.path.ismount(real) or real.samefile(Path.cwd())):
            _fill(
                real, partial=partial, field=field
            )  # a mount cannot be renamed; the working directory should stay
        else:
            _take_over(others, partial=partial)
            _swap(real, partial=partial)
        marker.sync_folder(real.parent)
    except BaseException as error:
        interrupted = (written or not isinstance(error, UserError)) and _stays(partial, keeps)
        if interrupted:
            _log.warning("what is finished stays in %s: the same command goes on from there", partial)
        raise
    finally:
        if not interrupted:
            discard_folder(partial, record=ORIGIN)
        os.close(handle)


def _stays(partial: Path, keeps: str) -> bool:
    """Whether a folder has the file with which it is kept."""
    return bool(keeps) and all((partial / name).is_file() for name in (keeps, ORIGIN))


def _locked(partial: Path, *, out: Path, field: str, keeps: str) -> int:
    """Create or empty the folder `partial` and lock it; returns the file descriptor of the lock."""
    for _ in range(5):
        partial.mkdir(exist_ok=True)
        handle = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(handle)
                raise refusal(
                    field,
                    out,
                    "another export is writing there",
                    allowed="one export at a time",
                    instead=f"wait for it, or {field}=FOLDER",
                ) from None
            # a file system without locks: readers still see only complete exports
        with suppress(FileNotFoundError):
            if os.stat(partial).st_ino == os.fstat(handle).st_ino:
                if not _stays(partial, keeps):
                    _clear(partial, out=out, field=field)
                return handle
        os.close(handle)  # another export has renamed this folder meanwhile
    raise refusal(
        field,
        out,
        "another export is writing there",
        allowed="one export at a time",
        instead=f"wait for it, or {field}=FOLDER",
    )


def _clear(partial: Path, *, out: Path, field: str) -> None:
    """Empty `partial`, left by a crash. Raises UserError if an export did not write it."""
    paths = list(partial.iterdir())
    strange = [
        path.name
        for path in paths
        if path.name not in ours(partial)
        and not (_SHARD.fullmatch(path.name) or is_temporary(path.name, of=ORIGIN))
    ]
    if strange and not (partial / ORIGIN).is_file():
        words = f"{partial} holds {strange[0]}, which no export wrote"
        raise refusal(
            field,
            out,
            words,
            allowed=f"a place without a {partial.name} beside it",
            instead=f"move it away, or {field}=FOLDER",
        )
    for path in sorted(paths, key=lambda path: path.name == ORIGIN):  # the record last
        discard(path)


def _others(real: Path, *, partial: Path, out: Path, field: str) -> list[Path]:
    """Files in the earlier export that no export wrote. Raises UserError if this export would replace one."""
    if not real.is_dir():
        return []
    mine = ours(real)
    others = [path for path in sorted(real.iterdir()) if path.name not in mine]
    taken = [path.name for path in others if (partial / path.name).exists()]
    if taken:
        words = f"it has {', '.join(taken[:3])}, which no export wrote and this one would replace"
        raise refusal(
            field,
            out,
            words,
            allowed="a folder without files of these names",
            instead=f"move them away, or {field}=FOLDER",
        )
    return others


def _take_over(others: list[Path], *, partial: Path) -> None:
    for path in others:
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, partial / path.name, symlinks=True, copy_function=_same)
        else:
            _same(str(path), str(partial / path.name))


def _same(source: str, target: str) -> str:
    """Link `source` to `target`, or copy it if the file system has no hard links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
    return target


def _swap(real: Path, *, partial: Path) -> None:
    if not real.exists():
        os.rename(partial, real)
        return
    names = itertools.chain([_REMOVED], (f"{_REMOVED}-{number}" for number in itertools.count(1)))
    removed = next(path for name in names if _free(path := real.with_name(real.name + name)))
    os.rename(real, removed)
    try:
        os.rename(partial, real)
    except OSError:
        os.rename(removed, real)
        raise
    discard_folder(removed, record=ORIGIN)


def _free(path: Path) -> bool:
    """Whether `path` does not exist, after removing what is left of an earlier export, or an empty folder."""
    if not (path.exists() or path.is_symlink()):
        return True
    empty = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    return (empty or is_export(path)) and discard_folder(path, record=ORIGIN)


def _fill(real: Path, *, partial: Path, field: str) -> None:
    """Replace our files in `real` one by one.

    The record is written first, so that it lists all of them after a crash.
    """
    before = ours(real) if is_export(real) else set()
    names = read_record(partial, record=ORIGIN)
    write_json(real / ORIGIN, {**read_object(partial / ORIGIN, field=field), "files": sorted(before | names)})
    for name in sorted(names - {ORIGIN}):
        if (real / name).is_dir():
            discard(real / name)
        os.replace(partial / name, real / name)
    for name in sorted(before - names):
        discard(real / name)
    os.replace(partial / ORIGIN, real / ORIGIN)
