"""The files behind one entry of `data.source`: a file, a folder, a pattern, or `stdlib`.

`stdlib` is the source of Python's own standard library, real text that every machine with Python has.
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
}
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
ALLOWED = f"files, folders, patterns such as 'texts/**/*.txt', or {STDLIB}; with data.format=datasets also hub ids"


def patterns(data: DataConfig) -> list[str]:
    """What the files of a folder must fit: data.pattern, or the endings of data.format."""
    return [data.pattern] if data.pattern else [pattern + outer for pattern in _PATTERNS[data.format] for outer in ("", *COMPRESSED)]


def by_ending(file: Path) -> str | None:
    """The format that a file's name tells; None: it tells none."""
    name = file.name.removesuffix(file.suffix) if file.suffix in COMPRESSED else file.name
    return next((kind for kind, endings in ENDINGS.items() if name.endswith(endings)), None)


def files_of(entry: str, *, path: Path, data: DataConfig, left_out: Counter[str]) -> Iterator[tuple[str, Path]]:
    """(name, path) of every file behind one entry of `data.source`. What `prepare` itself writes below it is no source."""
    written = Path(data.path).resolve() if data.path else None
    if entry == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        yield from ((f"{STDLIB}/{file.relative_to(root).as_posix()}", file) for file in _python_files(root))
    elif path.is_file():
        yield path.name, path
    elif path.is_dir():
        root = path.resolve()
        fits = _matcher(patterns(data))
        for file in _walk(root, but=written if written != root else None):
            name = file.relative_to(root).as_posix()
            if not fits(name):
                left_out["of other endings"] += 1
            elif file.is_file():
                yield f"{root.name}/{name}", file
            else:
                left_out["links to nothing, or no files"] += 1
    elif glob.has_magic(entry):
        matches = glob.glob(str(path), recursive=True)
        if hidden := len(glob.glob(str(path), recursive=True, include_hidden=True)) - len(matches):
            left_out["hidden"] += hidden
        root = Path(*path.parts[: next(i for i, part in enumerate(path.parts) if glob.has_magic(part))])
        inside = written is not None and written not in (root.resolve(), *root.resolve().parents)
        files = (Path(match) for match in matches if Path(match).is_file())
        yield from ((file.relative_to(root).as_posix(), file) for file in files if not (inside and written in file.resolve().parents))
    else:
        raise _missing(entry)


def _walk(root: Path, *, but: Path | None) -> Iterator[Path]:
    """Every file below `root`. Folders behind links come after the others and each folder once, so that loops end and real names win."""
    seen = {_identity(but)} if but is not None and but.is_dir() else set()
    waiting = [root]
    while waiting:
        links: list[Path] = []
        for folder, subfolders, names in os.walk(waiting.pop(0), onerror=_unreadable):
            if _identity(Path(folder)) in seen:
                subfolders.clear()
                continue
            seen.add(_identity(Path(folder)))
            links += [path for name in subfolders if (path := Path(folder, name)).is_symlink()]
            yield from (Path(folder, name) for name in names)
        waiting += sorted(links)


def _identity(folder: Path) -> tuple[int, int]:
    facts = folder.stat()
    return facts.st_dev, facts.st_ino


def _unreadable(error: OSError) -> None:
    words = f"a folder in it cannot be read ({error.strerror})"
    raise refusal("data.source", error.filename, words, allowed="folders that you may read", instead="other permissions, or a pattern that leaves it out")


def _matcher(patterns: list[str]) -> Callable[[str], bool]:
    """Whether a path below a folder fits one of the patterns, as pathlib's rglob takes them: from any folder on."""
    plain = [pattern for pattern in patterns if "/" not in pattern]
    names = re.compile("|".join(fnmatch.translate(pattern) for pattern in plain)) if plain else None
    deep = [("**", *pattern.split("/")) for pattern in patterns if "/" in pattern]

    def fits(path: str) -> bool:
        if names and names.match(path.rpartition("/")[2]):
            return True
        return any(_fits(tuple(path.split("/")), pattern) for pattern in deep)

    return fits


def _fits(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern or not parts:
        return not parts and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return any(_fits(parts[first:], pattern[1:]) for first in range(len(parts) + 1))
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _missing(entry: str) -> UserError:
    problem = f"there is no such file or folder (looked in {Path.cwd()})"
    path = Path(entry)
    there = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, [*there, STDLIB] if path.name == entry else there, n=1)
    instead = f"data.source=[{path.with_name(near[0])}]" if near else "the path as it is from this folder, or an absolute one"
    return refusal("data.source", entry, problem, allowed=ALLOWED, instead=instead)


def _python_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_STDLIB]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))
