"""Which files and datasets a corpus has, in a stable order, and which of its text files are held out for evaluation.

`data.source` names files, folders, patterns, Hugging Face datasets, or `stdlib`: the source of Python's own standard library,
real text that every machine with Python has. A text file is one document; the other formats hold many.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from hybridtrain.config.schema import DataConfig
from hybridtrain.types import UserError, refusal

STDLIB = "stdlib"
FORMAT = 2  # of a prepared folder
READABLE = (1, FORMAT)  # format 1 had text files only, and no statistics
COMPRESSED = (".gz", ".zst")
INFLATION = 4  # bytes of text behind a byte of a compressed file, about
_ENDINGS = {"jsonl": (".jsonl", ".ndjson", ".json"), "parquet": (".parquet",), "text": (".txt",)}
_PATTERNS = {
    "auto": ("*.txt", "*.jsonl", "*.ndjson", "*.parquet"),
    "text": ("*.txt",),
    "jsonl": ("*.jsonl", "*.ndjson", "*.json"),
    "parquet": ("*.parquet",),
    "chat": ("*.jsonl", "*.ndjson", "*.parquet"),
}
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
_ALLOWED = f"files, folders, patterns such as 'texts/**/*.txt', or {STDLIB}; with data.format=datasets also hub ids"


@dataclass(frozen=True, slots=True)
class Source:
    """One file or dataset of a corpus; nothing of it has been read."""

    name: str
    """Path below its source entry, with forward slashes: the same wherever the corpus lies. Decides the split of a text file."""
    path: str
    """A file, a folder, or a hub id."""
    format: str
    """text, jsonl, parquet or datasets."""
    size: int
    """Bytes of text, about; 0: known when it is opened."""
    version: str
    """Changes when the content does."""
    held_out: bool | None
    """Whether it is held out for evaluation; None: each record's content decides."""
    packed: str
    """How it is compressed, known when it is opened: gz, zst or not at all."""


def sources(data: DataConfig) -> list[Source]:
    """All files and datasets of `data.source`: entries in the given order, names sorted within one, a file listed twice taken once.

    Empty files are left out. Raises UserError for an entry that is not there and for a corpus with nothing to read.
    """
    found: dict[str, Source] = {}
    for entry in data.source:
        for source in _entry(entry, data=data):
            key = source.path if source.format == "datasets" else str(Path(source.path).resolve())
            if source.size or source.format == "datasets":
                found.setdefault(key, source)
    if not found:
        raise refusal(
            "data.source",
            data.source,
            f"no text in it (data.pattern={data.pattern or ' '.join(_patterns(data))})",
            allowed=_ALLOWED,
            instead=f"data.source=[{STDLIB}], or another data.pattern",
        )
    return _split(list(found.values()), fraction=data.eval_fraction)


def _entry(entry: str, *, data: DataConfig) -> Iterator[Source]:
    """What one entry of `data.source` names, sorted by name."""
    path = Path(entry).expanduser()
    saved = data.format in ("auto", "chat") and any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    hub = data.format == "chat" and not path.exists() and not glob.has_magic(entry) and _by_ending(path) is None
    if data.format == "datasets" or saved or hub:
        yield Source(name=path.name, path=str(path) if path.exists() else entry, format="datasets", size=0, version="", held_out=None, packed="")
        return
    for name, file in sorted(_files(entry, path=path, patterns=_patterns(data))):
        kind = data.format if data.format in _ENDINGS else _by_ending(file) or ("jsonl" if data.format == "chat" else "text")
        facts = file.stat()
        size = facts.st_size * (INFLATION if file.suffix in COMPRESSED else 1)
        yield Source(name=name, path=str(file), format=kind, size=size, version=str(facts.st_mtime_ns), held_out=False if kind == "text" else None, packed="")


def _patterns(data: DataConfig) -> list[str]:
    return [data.pattern] if data.pattern else [pattern + outer for pattern in _PATTERNS[data.format] for outer in ("", *COMPRESSED)]


def _by_ending(file: Path) -> str | None:
    name = file.name.removesuffix(file.suffix) if file.suffix in COMPRESSED else file.name
    return next((kind for kind, endings in _ENDINGS.items() if name.endswith(endings)), None)


def _files(entry: str, *, path: Path, patterns: list[str]) -> Iterator[tuple[str, Path]]:
    """(name, path) of every file behind one entry of `data.source`."""
    if entry == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        yield from ((f"{STDLIB}/{file.relative_to(root).as_posix()}", file) for file in _python_files(root))
    elif path.is_file():
        yield path.name, path
    elif path.is_dir():
        root = path.resolve()
        files = {file for pattern in patterns for file in root.rglob(pattern) if file.is_file()}
        yield from ((f"{root.name}/{file.relative_to(root).as_posix()}", file) for file in files)
    elif glob.has_magic(entry):
        matches = glob.glob(str(path), recursive=True)
        root = Path(*path.parts[: next(i for i, part in enumerate(path.parts) if glob.has_magic(part))])
        yield from ((Path(match).relative_to(root).as_posix(), Path(match)) for match in matches if Path(match).is_file())
    else:
        raise _missing(entry)


def _missing(entry: str) -> UserError:
    problem = f"there is no such file or folder (looked in {Path.cwd()})"
    return refusal("data.source", entry, problem, allowed=_ALLOWED, instead=f"data.source=[{STDLIB}]")


def _python_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_STDLIB]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def _split(found: list[Source], *, fraction: float) -> list[Source]:
    """Hold out the text files whose name hashes below `fraction`, so that others coming or going move none of them.

    Both splits get at least one when there are two and fraction > 0.
    """
    texts = [source for source in found if source.format == "text"]
    if fraction == 0 or len(texts) < 2:
        return found
    places = {source.path: share(hashlib.sha256(source.name.encode("utf-8", "surrogateescape")).digest()) for source in texts}
    held_out = {path for path, place in places.items() if place < fraction} or {min(places, key=places.__getitem__)}
    if len(held_out) == len(places):
        held_out.discard(max(places, key=places.__getitem__))
    return [replace(source, held_out=source.path in held_out) if source.format == "text" else source for source in found]


def share(digest: bytes) -> float:
    """A place in [0, 1) that follows from a hash."""
    return int.from_bytes(digest[:8], "big") / 2**64
