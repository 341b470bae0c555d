"""The files of one entry of `data.source`: a file, a folder, a pattern, or `stdlib`.

`stdlib` is the source code of Python's standard library: real text that exists on every machine with Python.
"""

from __future__ import annotations

import difflib
import fnmatch
import glob
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from hybridtrain.config.schema import DataConfig
from hybridtrain.errors import UserError, refusal

STDLIB = "stdlib"
COMPRESSED = (".gz", ".zst")
ENDINGS = {"jsonl": (".jsonl", ".ndjson", ".json"), "parquet": (".parquet",), "text": (".txt",)}
_PATTERNS = {
    "auto": ("*.txt", "*.jsonl", "*.ndjson", "*.parquet"),
    "text": ("*.txt",),
    "jsonl": ("*.jsonl", "*.ndjson", "*.json"),
    "parquet": ("*.parquet",),
    "chat": ("*.jsonl", "*.ndjson", "*.parquet"),
    "labelled": ("*.jsonl", "*.ndjson", "*.parquet"),
    "labelled_words": ("*.jsonl", "*.ndjson", "*.parquet"),
    "answers": ("*.jsonl", "*.ndjson", "*.parquet"),
}
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
ALLOWED = (
    f"files, folders, patterns such as 'texts/**/*.txt', or {STDLIB}; with data.format=datasets also hub ids"
)


def patterns(data: DataConfig) -> list[str]:
    """Patterns of the files to read in a folder: data.pattern, or those of data.format."""
    return (
        [data.pattern]
        if data.pattern
        else [pattern + outer for pattern in _PATTERNS[data.format] for outer in ("", *COMPRESSED)]
    )


def format_of(file: Path) -> str | None:
    """The format by the ending of a file's name; None for an unknown ending."""
    name = file.name.removesuffix(file.suffix) if file.suffix in COMPRESSED else file.name
    return next((kind for kind, endings in ENDINGS.items() if name.endswith(endings)), None)


def files_of(
    entry: str, *, path: Path, data: DataConfig, left_out: Counter[str]
) -> Iterator[tuple[str, Path]]:
    """(name, path) of every file of an entry of `data.source`, except in the folder that `prepare` writes.

    Counts files that are left out by reason. Raises UserError for an entry that does not exist.
    """
    out = Path(data.path).resolve() if data.path else None
    if entry == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        yield from ((f"{STDLIB}/{file.relative_to(root).as_posix()}", file) for file in _python_files(root))
    elif path.is_file():
        yield path.name, path
    elif path.is_dir():
        root = path.resolve()
        matches = _matcher(patterns(data))
        for file in _walk(root, exclude=out if out != root else None):
            name = file.relative_to(root).as_posix()
            if not matches(name):
                left_out["of other endings"] += 1
            elif file.is_file():
                yield f"{root.name}/{name}", file
            else:
                left_out["broken links or no regular files"] += 1
    elif glob.has_magic(entry):
        paths = glob.glob(str(path), recursive=True)
        if hidden := len(glob.glob(str(path), recursive=True, include_hidden=True)) - len(paths):
            left_out["hidden"] += hidden
        root = Path(*path.parts[: next(i for i, part in enumerate(path.parts) if glob.has_magic(part))])
        inside = out is not None and out not in (root.resolve(), *root.resolve().parents)
        files = (Path(name) for name in paths if Path(name).is_file())
        yield from (
            (file.relative_to(root).as_posix(), file)
            for file in files
            if not (inside and out in file.resolve().parents)
        )
    else:
        raise _missing(entry)


def _walk(root: Path, *, exclude: Path | None) -> Iterator[Path]:
    """Every file below `root`, except in `exclude`.

    Follows links after all other folders, and visits each folder once.
    """
    seen = {_identity(exclude)} if exclude is not None and exclude.is_dir() else set()
    queue = [root]
    while queue:
        links: list[Path] = []
        for folder, subfolders, names in os.walk(queue.pop(0), onerror=_unreadable):
            if _identity(Path(folder)) in seen:
                subfolders.clear()
                continue
            seen.add(_identity(Path(folder)))
            links += [path for name in subfolders if (path := Path(folder, name)).is_symlink()]
            yield from (Path(folder, name) for name in names)
        queue += sorted(links)


def _identity(folder: Path) -> tuple[int, int]:
    stat = folder.stat()
    return stat.st_dev, stat.st_ino


def _unreadable(error: OSError) -> None:
    problem, instead = (
        f"a folder in it cannot be read ({error.strerror})",
        "other permissions, or a pattern that leaves it out",
    )
    raise refusal(
        "data.source", error.filename, problem, allowed="folders that you may read", instead=instead
    )


def _matcher(patterns: list[str]) -> Callable[[str], bool]:
    """Returns a function that tests whether a relative path matches one of the patterns, in the
    sense of pathlib's rglob.
    """
    of_names = [pattern for pattern in patterns if "/" not in pattern]
    names = re.compile("|".join(fnmatch.translate(pattern) for pattern in of_names)) if of_names else None
    of_paths = [("**", *pattern.split("/")) for pattern in patterns if "/" in pattern]

    def matches(path: str) -> bool:
        if names and names.match(path.rpartition("/")[2]):
            return True
        return any(_match(tuple(path.split("/")), pattern) for pattern in of_paths)

    return matches


def _match(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern or not parts:
        return not parts and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return any(_match(parts[first:], pattern[1:]) for first in range(len(parts) + 1))
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _match(parts[1:], pattern[1:])


def _missing(entry: str) -> UserError:
    problem = f"there is no such file or folder (looked in {Path.cwd()})"
    path = Path(entry)
    siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, [*siblings, STDLIB] if path.name == entry else siblings, n=1)
    instead = (
        f"data.source=[{path.with_name(near[0])}]"
        if near
        else "the path as it is from this folder, or an absolute one"
    )
    return refusal("data.source", entry, problem, allowed=ALLOWED, instead=instead)


def _python_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_STDLIB]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))
