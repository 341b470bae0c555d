"""Which files and datasets a corpus has, in a stable order, and which of its text files are held out for evaluation.

`data.source` names files, folders, patterns (files.py) and Hugging Face datasets. A text file is one
document; the other formats hold many.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import platform
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hybridtrain.config.schema import DataConfig
from hybridtrain.data.prepare import blocks
from hybridtrain.data.prepare.blocks import BY_CHANCE, SURELY, WHOLE, share
from hybridtrain.data.prepare.files import ALLOWED, COMPRESSED, ENDINGS, STDLIB, by_ending, files_of, patterns
from hybridtrain.errors import refusal

FORMAT = 2  # of a prepared folder
READABLE = (1, FORMAT)  # format 1 had text files only, and no statistics
LISTED = 1000  # sources that corpus.json names, so that a change can be named
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja")
MOST_TIMES = 3  # what is held out is at most so many times what was asked
INFLATION = 4  # bytes of text behind a byte of a compressed file, about
CHAT, LABELLED = "chat", "labelled"
FITTED = (CHAT, LABELLED)
"""Formats that say what a record is, not what its file is: their documents are fitted into rows whole. Text is a stream that is cut into rows."""


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
    blocks: str
    """Whether blocks of a text file are held out, and how (blocks.py); "" for none."""
    packed: str
    """How it is compressed, known when it is opened: gz, zst or not at all."""


@dataclass(frozen=True)
class Listing:
    """What a corpus is made of."""

    sources: list[Source]
    left_out: dict[str, int]
    """Files that were met and are not read, by reason."""
    tokenizer: str
    """Hash of the tokenizer's files, where it is a folder; "" for another."""

    before: dict[str, str]
    """What an earlier `prepare` of the folder held out in part, or had to: it stays held out."""

    def held_out(self, *, fraction: float) -> dict[str, str]:
        """The same of this listing, for corpus.json."""
        texts = [source for source in self.sources if source.format == "text"]
        forced = {source.name: WHOLE for source in texts if source.held_out and share(_name_digest(source)) >= fraction}
        return forced | {source.name: source.blocks for source in texts if source.blocks}

    def check_share(self, *, fraction: float) -> None:
        """Refuse a split of text files far from data.eval_fraction (raises UserError); splits by record are not checked here."""
        if all(source.format == "text" for source in self.sources):
            total = sum(source.size for source in self.sources)
            check_share(sum(source.size * (fraction if source.blocks else bool(source.held_out)) for source in self.sources) / total, fraction=fraction)

    @property
    def summary(self) -> str:
        """For people."""
        count = len(self.sources)
        left_out = ", ".join(f"{number:,} {reason}" for reason, number in self.left_out.items())
        return f"reading {count:,} {'source' if count == 1 else 'sources'}" + (f"; left out: {left_out}" if left_out else "")

    def record(self) -> dict[str, Any]:
        """What tells, later, whether they have changed: {digest, count, tokenizer, files}; files only where there are few."""
        files = {source.name: [source.size, source.version] for source in self.sources}
        digest = hashlib.sha256(json.dumps([[name, *facts] for name, facts in sorted(files.items())]).encode()).hexdigest()
        return {"digest": digest, "count": len(self.sources), "tokenizer": self.tokenizer, "files": files if len(files) <= LISTED else None}

    def changes(self, before: Mapping[str, Any]) -> str:
        """What differs from an earlier `record`, in words; "" for nothing."""
        now = self.record()
        if self.tokenizer != before.get("tokenizer"):
            return "the tokenizer has changed"
        if now["digest"] == before.get("digest"):
            return ""
        old, new = before.get("files"), now["files"]
        if not isinstance(old, dict) or new is None:
            return f"some of the {now['count']:,} sources have changed (there were {before.get('count')})"
        kinds = {
            "changed": [n for n in new if n in old and new[n] != old[n]],
            "new": [n for n in new if n not in old],
            "gone": [n for n in old if n not in new],
        }
        return "; ".join(f"{len(names):,} {kind} ({', '.join(names[:3])}{', ...' if names[3:] else ''})" for kind, names in kinds.items() if names)


def check_share(held_out: float, *, fraction: float) -> None:
    """Refuse to hold out much more than was asked (raises UserError)."""
    if held_out > MOST_TIMES * fraction:
        raise refusal(
            "data.eval_fraction",
            fraction,
            f"{held_out:.1%} of the corpus would be held out: it is too small to be divided so, or a few of its documents are much of it",
            allowed=f"a share that comes out within {MOST_TIMES} times what was asked",
            instead=f"data.eval_fraction={min(0.5, math.ceil(100 * held_out) / 100):g}, data.eval_fraction=0 with data.eval_path for another corpus, or more text",
        )


def _name_digest(source: Source) -> bytes:
    return hashlib.sha256(source.name.encode("utf-8", "surrogateescape")).digest()


def listing(data: DataConfig) -> Listing:
    """All files and datasets of `data.source`: entries in the given order, names sorted within one, a file listed twice taken once.

    Empty files are left out. Nothing is opened. Raises UserError for an entry that is not there and for a corpus with nothing to read.
    """
    found: dict[str, Source] = {}
    left_out: Counter[str] = Counter()
    for entry in data.source:
        for source in _entry(entry, data=data, left_out=left_out):
            key = source.path if source.format == "datasets" else str(Path(source.path).resolve())
            if not source.size and source.format != "datasets":
                left_out["empty"] += 1
            elif found.setdefault(key, source) is not source:
                left_out["named twice"] += 1
    if not found:
        raise refusal(
            "data.source",
            data.source,
            f"no text in it (data.pattern={data.pattern or ' '.join(patterns(data))})",
            allowed=ALLOWED,
            instead="another data.pattern or data.source",
        )
    before = _held_out_before(data)
    return Listing(_split(list(found.values()), fraction=data.eval_fraction, before=before), dict(sorted(left_out.items())), _tokenizer_digest(data), before)


def _tokenizer_digest(data: DataConfig) -> str:
    path = Path(data.tokenizer)
    folder = path.parent if path.is_file() else path
    if data.tokenizer == "train" or not folder.is_dir() or Path(data.path).resolve() in folder.resolve().parents:
        return ""
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _entry(entry: str, *, data: DataConfig, left_out: Counter[str]) -> Iterator[Source]:
    """What one entry of `data.source` names, sorted by name."""
    path = Path(entry)
    saved = data.format in ("auto", *FITTED) and any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    hub = data.format in FITTED and not path.exists() and not glob.has_magic(entry) and by_ending(path) is None
    if data.format == "datasets" or saved or hub:
        version = _folder_version(path) if path.is_dir() else ""
        yield Source(
            name=path.name, path=str(path) if path.exists() else entry, format="datasets", size=0, version=version, held_out=None, blocks="", packed=""
        )
        return
    for name, file in sorted(files_of(entry, path=path, data=data, left_out=left_out)):
        kind = data.format if data.format in ENDINGS else by_ending(file) or ("jsonl" if data.format in FITTED else "text")
        facts = file.stat()
        version = platform.python_version() if entry == STDLIB else str(facts.st_mtime_ns)  # its own place on each machine
        size = facts.st_size * (INFLATION if file.suffix in COMPRESSED else 1)
        yield Source(name=name, path=str(file), format=kind, size=size, version=version, held_out=False if kind == "text" else None, blocks="", packed="")


def _folder_version(folder: Path) -> str:
    """Changes when a file below the folder does."""
    facts = sorted((name, os.stat(os.path.join(at, name))) for at, _, names in os.walk(folder) for name in names)
    return hashlib.sha256(json.dumps([[name, one.st_size, one.st_mtime_ns] for name, one in facts]).encode()).hexdigest()


def _split(found: list[Source], *, fraction: float, before: Mapping[str, str]) -> list[Source]:
    """Hold out the text files whose name hashes below `fraction`, and blocks of those that are much of the corpus (blocks.py).

    Others coming or going move none of them; `before` names those that an earlier `prepare` of the folder held out in part, or had to.
    Both splits get something when there is text for both and fraction > 0.
    """
    texts = [source for source in found if source.format == "text"]
    if fraction == 0 or not texts:
        return found
    total = sum(source.size for source in found)
    places = {source.path: share(_name_digest(source)) for source in texts}
    how: dict[str, str] = {}
    for source in texts:
        old = before.get(source.name)
        if old in (BY_CHANCE, SURELY) or blocks.is_long(source.size, total=total):
            how[source.path] = old if old in (BY_CHANCE, SURELY) else BY_CHANCE
        elif places[source.path] < fraction or old == WHOLE:
            how[source.path] = WHOLE
    long = [source for source in texts if how.get(source.path, WHOLE) != WHOLE]
    none = not any(kind != BY_CHANCE for kind in how.values()) and not any(_has_block(source, fraction=fraction) for source in long)
    if none and (long or len(texts) > 1):
        chosen = min(long or texts, key=lambda source: places[source.path]).path
        how[chosen] = SURELY if long else WHOLE
    if not long and len(how) == len(texts):
        how.pop(max(places, key=places.__getitem__))
    return [
        replace(source, held_out=how.get(source.path) == WHOLE, blocks=_in_part(how.get(source.path))) if source.format == "text" else source
        for source in found
    ]


def _in_part(how: str | None) -> str:
    return how if how in (BY_CHANCE, SURELY) else ""


def _has_block(source: Source, *, fraction: float) -> bool:
    return next(blocks.places(source.name, fraction=fraction, how=BY_CHANCE))[1] <= source.size


def _held_out_before(data: DataConfig) -> dict[str, str]:
    """What an earlier `prepare` of this folder, with the same fraction, held out in part or had to: {name: how}."""
    try:
        record = json.loads((Path(data.path) / "corpus.json").read_bytes())
        same = record["settings"]["eval_fraction"] == data.eval_fraction
        return {name: how for name, how in record["held_out"].items() if how in (BY_CHANCE, SURELY, WHOLE)} if same else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
