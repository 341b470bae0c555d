"""Small files: atomic writes, reads with limits, removal without exceptions. No torch.

A command that writes into a folder chosen by the user records there the names of its files (`write_record`),
replaces only those, and refuses a folder with other files of the same names (`check_replaceable`). Names are
exact, never patterns.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hybridtrain.errors import UserError, refusal

_log = logging.getLogger("hybridtrain.runtime.files")
_MAX_BYTES = 512 << 20
"""Limit of files that are read whole, above the largest tokenizer or index."""
_STALE_S = 600.0
"""Age in seconds of a temporary file whose writer must have been killed."""
_LFS = b"version https://git-lfs"
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file would be larger than is allowed",
}
_FORBIDDEN = {
    errno.EACCES: "permission denied",
    errno.EPERM: "not permitted",
    errno.EROFS: "the file system is read-only",
}
_GONE = {
    errno.ENOENT: "it has been moved or removed",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EEXIST: "something else has this name",
}
_GONE |= {errno.EISDIR: "a folder has this name", errno.ELOOP: "a link has this name"}


def write_atomically(file: Path, data: str | bytes) -> None:
    """Write a temporary file and rename it to `file`: a reader sees the old or the new content, never a part.

    Raises OSError. The temporary name contains process and thread, so that two writers do not share a file.
    """
    _write(file, data, sync=True)


def write_unsynced(file: Path, data: str | bytes) -> None:
    """`write_atomically` without fsync, for frequently written files whose content is also elsewhere: a power
    failure may lose it.
    """
    _write(file, data, sync=False)


def _write(file: Path, data: str | bytes, *, sync: bool) -> None:
    temporary = file.with_name(f".{file.name.lstrip('.')}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        with temporary.open("wb") as stream:
            stream.write(data if isinstance(data, bytes) else data.encode("utf-8", "backslashreplace"))
            stream.flush()
            if sync:
                os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def is_temporary(name: str, *, of: str) -> bool:
    """Whether `name` is that of a temporary file of `write_atomically(of)`, left by a killed process."""
    return re.fullmatch(re.escape(f".{of.lstrip('.')}.") + r"\d+-\d+\.partial", name) is not None


def remove_stale_temporaries(folder: Path) -> None:
    """Remove temporary files of killed processes from `folder`.

    Younger ones than _STALE_S may still be in use and stay.
    """
    with contextlib.suppress(OSError):
        for path in folder.glob(".*.partial"):
            if re.search(r"\.\d+-\d+\.partial$", path.name) and time.time() - path.stat().st_mtime > _STALE_S:
                discard(path)


def write_json(file: Path, content: Any) -> None:
    """Write JSON atomically; NaN and infinities become null. Raises OSError."""
    write_atomically(file, json.dumps(finite(content), indent=1, allow_nan=False) + "\n")


def append_json(file: Path, values: Mapping[str, Any]) -> None:
    """Append one line of JSON, on a new line even after an incomplete one. Raises OSError."""
    line = json.dumps(finite(values), allow_nan=False) + "\n"
    with file.open("ab+") as stream:
        torn = stream.tell() > 0 and (stream.seek(-1, os.SEEK_END), stream.read(1))[1] != b"\n"
        stream.write((("\n" if torn else "") + line).encode())


def finite(value: Any) -> Any:
    """`value` with NaN and infinities replaced by None, also inside mappings, lists and tuples."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


LARGEST = 2.0**63
"""No file of ours has numbers of larger magnitude."""


def number(value: Any) -> float | int | None:
    """`value` if it is a finite number below LARGEST, else None."""
    # NaN fails too
    sound = isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST
    return value if sound else None


def one_line(text: str) -> str:
    """`text` as one printable line: whitespace as single spaces, unprintable characters as escapes."""
    words = " ".join(text.split())
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode()
        for letter in words
    )


def read_json(file: Path, *, field: str) -> Any:
    """The content of a JSON file. Raises UserError with `field` and the file if it cannot be read."""
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise _unreadable(
                field, file, f"{file.stat().st_size:,} bytes are too many for a file of this kind"
            )
        data = file.read_bytes()
    except OSError as error:
        raise _unreadable(field, file, error.strerror or str(error)) from error
    if data.startswith(_LFS):
        raise lfs_pointer(field, file)
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _unreadable(field, file, f"it is not UTF-8 (byte {error.start})") from error
    except ValueError as error:
        raise _unreadable(field, file, f"it is not JSON ({error})") from error
    except RecursionError as error:
        raise _unreadable(field, file, "its brackets are nested too deeply") from error


def read_object(file: Path, *, field: str) -> dict[str, Any]:
    """`read_json` of a file with one JSON object; UserError for anything else."""
    content = read_json(file, field=field)
    if not isinstance(content, dict):
        raise _unreadable(field, file, f"it holds no object but {type(content).__name__}")
    return content


def _unreadable(field: str, file: Path, problem: str) -> UserError:
    return refusal(
        field,
        file,
        f"it cannot be read: {problem}",
        allowed="a whole file",
        instead="restore the file, or write it again",
    )


def is_lfs_pointer(file: Path) -> bool:
    """Whether the file is a git-lfs pointer, left by a clone without git-lfs."""
    try:
        with file.open("rb") as stream:
            return stream.read(len(_LFS)) == _LFS
    except OSError:
        return False


def lfs_pointer(field: str, file: Path) -> UserError:
    """The refusal of a git-lfs pointer."""
    return refusal(
        field,
        file,
        "it is a git-lfs pointer, the file itself was not downloaded",
        allowed="the file itself",
        instead="git lfs pull",
    )


def unwritable(field: str, path: Path, error: OSError) -> UserError:
    """The refusal of `path`, which cannot be written because of `error`."""
    code = error.errno or 0
    if code in _FULL:
        problem, instead = _FULL[code], f"free some space, or {field}=FOLDER"
    elif code in _FORBIDDEN:
        problem, instead = _FORBIDDEN[code], f"{field}=FOLDER that you may write"
    elif (
        code == errno.ENOENT
        and error.filename
        and error.filename2 is None
        and Path(os.fsdecode(error.filename)).parent.is_dir()
    ):
        problem, instead = (
            f"nothing can be made in {Path(os.fsdecode(error.filename)).parent}",
            f"{field}=FOLDER",
        )
    else:
        problem, instead = _GONE.get(code, str(error)), f"{field}=FOLDER"
    where = f" ({error.filename})" if error.filename and str(error.filename) != str(path) else ""
    return refusal(
        field,
        path,
        f"it cannot be written: {problem}{where}",
        allowed="a folder with space that you may write",
        instead=instead,
    )


def discard_folder(folder: Path, *, record: str) -> bool:
    """Remove a folder of ours; returns whether it is gone.

    The file `record` goes last, so that a partly removed folder is still ours.
    """
    others: list[Path] = []
    if not folder.is_symlink():
        with contextlib.suppress(OSError):
            others = [path for path in folder.iterdir() if path.name != record]
    gone = [discard(path) for path in others]
    return all(gone) and discard(folder)


def discard(path: Path) -> bool:
    """Remove a file, link or folder as far as possible, and warn if something remains.

    Returns whether all is gone. Removes a link, not its target. Never raises: a failed cleanup must not end
    a run.
    """
    first: list[BaseException] = []
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, onerror=lambda *call: first.append(call[2][1]))
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        first.append(error)
    if not path.exists() and not path.is_symlink():
        return True
    why = first[0] if first else None
    _log.warning("%s cannot be removed and stays (%s)", path, getattr(why, "strerror", None) or why)
    return False


def read_record(folder: Path, *, record: str) -> set[str]:
    """Names of the files that hybridtrain wrote into `folder`, by its record; empty if there is none.

    Anybody may have edited the record: names that lead out of the folder are ignored.
    """
    try:
        names = json.loads((folder / record).read_bytes())["files"]
        return {name for name in names if is_inside(name)}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()


def is_inside(name: object) -> bool:
    """Whether `name` is a relative file name that does not lead out of its folder."""
    if not isinstance(name, str) or "\0" in name:
        return False
    return name.strip("./ ") != "" and not os.path.isabs(name) and ".." not in Path(name).parts


def check_outside_checkpoints(path: Path, *, field: str) -> None:
    """Refuse a path inside <run>/checkpoints, where the run removes old folders (raises UserError)."""
    above = next(
        (
            place
            for place in (path, *path.resolve().parents)
            if place.name == "checkpoints" and (place.parent / "config.yaml").is_file()
        ),
        None,
    )
    if above is not None:
        problem = f"it lies among the checkpoints of {above.parent}, which that run removes"
        raise refusal(
            field,
            path,
            problem,
            allowed="a folder apart from the checkpoints of runs",
            instead=f"another {field}",
        )


def check_replaceable(folder: Path, names: Iterable[str], *, record: str, field: str) -> None:
    """Refuse a folder that has files of these `names` which its record does not list (raises UserError)."""
    check_outside_checkpoints(folder, field=field)
    remove_stale_temporaries(folder)
    ours = read_record(folder, record=record)
    foreign = sorted(
        name
        for name in names
        if name not in ours and ((folder / name).exists() or (folder / name).is_symlink())
    )
    if foreign:
        words = (
            f"it has {', '.join(foreign[:3])}{' ...' if foreign[3:] else ''}, "
            "which this command did not write and would replace"
        )
        raise refusal(
            field,
            folder,
            words,
            allowed="a new folder, an empty one, or one that this command wrote",
            instead=f"another {field}",
        )


def write_record(folder: Path, names: Iterable[str], *, record: str) -> None:
    """Record in `folder` that these files are ours; call it before writing them. Raises OSError."""
    write_json(folder / record, {"files": sorted(set(names))})
