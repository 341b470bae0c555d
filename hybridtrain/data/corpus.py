"""Which documents a corpus has, in a stable order, and which of them are held out for evaluation.

A document is a text file. `data.source` names files, folders, patterns, or `stdlib`: the source of Python's own
standard library, real text that every machine with Python has.
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
from hybridtrain.types import refusal

STDLIB = "stdlib"
FORMAT = 1  # of a prepared folder
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


@dataclass(frozen=True)
class Document:
    """One text file of a corpus; nothing is read until `text`."""

    name: str
    """Path below its source entry, with forward slashes: the same wherever the corpus lies. Decides the split."""
    path: Path
    size: int
    """Bytes."""
    held_out: bool

    def text(self) -> str:
        """The file as UTF-8. Bytes that are not become U+FFFD, which `prepare` counts and reports."""
        return self.path.read_bytes().decode("utf-8-sig", errors="replace")


def documents(data: DataConfig) -> list[Document]:
    """All documents of `data.source`: entries in the given order, names sorted within one, a file listed twice taken once.

    Empty files are no documents. Raises UserError for an entry that is not there and for a corpus without text.
    """
    found: dict[Path, Document] = {}
    for entry in data.source:
        for name, path in sorted(_entry(entry, pattern=data.pattern)):
            key = path.resolve()
            size = key.stat().st_size
            if size and key not in found:
                found[key] = Document(name=name, path=path, size=size, held_out=False)
    if not found:
        raise refusal(
            "data.source",
            data.source,
            f"no text in it (data.pattern={data.pattern})",
            allowed=f"text files, folders with files that match data.pattern, patterns such as 'texts/**/*.txt', or {STDLIB}",
            instead=f"data.source=[{STDLIB}], or another data.pattern",
        )
    return _split(list(found.values()), fraction=data.eval_fraction)


def _entry(entry: str, *, pattern: str) -> Iterator[tuple[str, Path]]:
    """(name, path) of every file behind one entry of `data.source`."""
    path = Path(entry).expanduser()
    if entry == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        yield from ((f"{STDLIB}/{file.relative_to(root).as_posix()}", file) for file in _python_files(root))
    elif path.is_file():
        yield path.name, path
    elif path.is_dir():
        root = path.resolve()
        yield from ((f"{root.name}/{file.relative_to(root).as_posix()}", file) for file in root.rglob(pattern) if file.is_file())
    elif glob.has_magic(entry):
        matches = glob.glob(str(path), recursive=True)
        root = Path(*path.parts[: next(i for i, part in enumerate(path.parts) if glob.has_magic(part))])
        yield from ((Path(match).relative_to(root).as_posix(), Path(match)) for match in matches if Path(match).is_file())
    else:
        raise refusal(
            "data.source",
            entry,
            f"there is no such file or folder (looked in {Path.cwd()})",
            allowed=f"files, folders, patterns such as 'texts/**/*.txt', or {STDLIB}",
            instead=f"data.source=[{STDLIB}]",
        )


def _python_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_STDLIB]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def _split(all_documents: list[Document], *, fraction: float) -> list[Document]:
    """Hold out the documents whose name hashes below `fraction`, so that others coming or going move none of them.

    Both splits get at least one document when there are two and fraction > 0.
    """
    if fraction == 0 or len(all_documents) < 2:
        return all_documents
    places = [int.from_bytes(hashlib.sha256(document.name.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64 for document in all_documents]
    held_out = [place < fraction for place in places]
    if not any(held_out):
        held_out[places.index(min(places))] = True
    if all(held_out):
        held_out[places.index(max(places))] = False
    return [replace(document, held_out=flag) for document, flag in zip(all_documents, held_out, strict=True)]
