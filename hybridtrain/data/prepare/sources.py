"""Lists the files and datasets of a corpus in a stable order, and decides which text files are
held out for evaluation.

`data.source` names files, folders, patterns (files.py) and Hugging Face datasets. A text file is one
document; the other formats contain many.
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
from hybridtrain.data.prepare.files import ALLOWED, COMPRESSED, ENDINGS, STDLIB, files_of, format_of, patterns
from hybridtrain.errors import refusal

FORMAT = 2  # version of the layout of a prepared folder
READABLE = (1, FORMAT)  # 1 had text files only, and no statistics
LISTED = 1000  # most sources that corpus.json lists, to report which one has changed
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
)
MAX_RATIO = 3  # largest allowed ratio of the held-out part to data.eval_fraction
INFLATION = 4  # bytes of text per byte of a compressed file, approximately
CHAT, LABELLED, LABELLED_WORDS, ANSWERS = "chat", "labelled", "labelled_words", "answers"
PACKED_FORMATS = (CHAT, LABELLED, LABELLED_WORDS, ANSWERS)
"""Formats whose documents are packed whole into rows; other text is a stream that is split into rows.

They describe the record, not the type of the file."""


@dataclass(frozen=True, slots=True)
class Source:
    """One file or dataset of a corpus; `listing` does not open it."""

    name: str
    """Path relative to its source entry, with forward slashes. Decides the split of a text file."""
    path: str
    """A file, a folder, or a hub id."""
    format: str
    """text, jsonl, parquet or datasets."""
    size: int
    """Approximate bytes of text; 0: unknown until it is opened."""
    version: str
    """Changes with the content."""
    held_out: bool | None
    """Whether it is held out for evaluation; None: decided for each record by its content."""
    blocks: str
    """How blocks of a text file are held out (blocks.py); "" for none."""
    compression: str
    """gz, zst or "" for none; "" until it is opened."""


@dataclass(frozen=True)
class Listing:
    """The sources of a corpus."""

    sources: list[Source]
    left_out: dict[str, int]
    """Reason -> number of files that are not read."""
    tokenizer: str
    """Hash of the tokenizer's files if it is a folder, else ""."""

    before: dict[str, str]
    """`held_out` of an earlier `prepare` of the folder: those sources stay held out."""

    def held_out(self, *, fraction: float) -> dict[str, str]:
        """Name -> how it is held out, for sources of which blocks are, or which the hash of the name alone
        would not hold out.
        """
        texts = [source for source in self.sources if source.format == "text"]
        forced = {
            source.name: WHOLE
            for source in texts
            if source.held_out and share(_name_digest(source)) >= fraction
        }
        return forced | {source.name: source.blocks for source in texts if source.blocks}

    def check_share(self, *, fraction: float) -> None:
        """Raise UserError if far more text files are held out than data.eval_fraction.

        Splits by record are checked later.
        """
        if all(source.format == "text" for source in self.sources):
            total = sum(source.size for source in self.sources)
            check_share(
                sum(
                    source.size * (fraction if source.blocks else bool(source.held_out))
                    for source in self.sources
                )
                / total,
                fraction=fraction,
            )

    @property
    def summary(self) -> str:
        """Numbers of sources and files left out, as a sentence."""
        count = len(self.sources)
        left_out = ", ".join(f"{number:,} {reason}" for reason, number in self.left_out.items())
        return f"reading {count:,} {'source' if count == 1 else 'sources'}" + (
            f"; left out: {left_out}" if left_out else ""
        )

    def record(self) -> dict[str, Any]:
        """To detect changes later: {digest, count, tokenizer, files}; files is None for more than LISTED."""
        files = {source.name: [source.size, source.version] for source in self.sources}
        digest = hashlib.sha256(
            json.dumps([[name, *facts] for name, facts in sorted(files.items())]).encode()
        ).hexdigest()
        return {
            "digest": digest,
            "count": len(self.sources),
            "tokenizer": self.tokenizer,
            "files": files if len(files) <= LISTED else None,
        }

    def changes(self, before: Mapping[str, Any]) -> str:
        """The differences from an earlier `record`, as text; "" for none."""
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
            "removed": [n for n in old if n not in new],
        }
        return "; ".join(
            f"{len(names):,} {kind} ({', '.join(names[:3])}{', ...' if names[3:] else ''})"
            for kind, names in kinds.items()
            if names
        )


def check_share(held_out: float, *, fraction: float) -> None:
    """Raise UserError if the share that is held out is more than MAX_RATIO times `fraction`."""
    if held_out > MAX_RATIO * fraction:
        raise refusal(
            "data.eval_fraction",
            fraction,
            (
                f"{held_out:.1%} of the corpus would be held out: "
                "it is too small for this split, or a few documents make up much of it"
            ),
            allowed=f"a fraction for which the split comes out at most {MAX_RATIO} times as large",
            instead=(
                f"data.eval_fraction={min(0.5, math.ceil(100 * held_out) / 100):g}, "
                "data.eval_fraction=0 with data.eval_path for another corpus, or more text"
            ),
        )


def _name_digest(source: Source) -> bytes:
    return hashlib.sha256(source.name.encode("utf-8", "surrogateescape")).digest()


def listing(data: DataConfig) -> Listing:
    """All files and datasets of `data.source`: entries in the given order, sorted by name
    within each, without duplicates.

    Empty files are left out. Nothing is opened. Raises UserError for an entry that does not exist, and if
    there is nothing to read.
    """
    by_path: dict[str, Source] = {}
    left_out: Counter[str] = Counter()
    for entry in data.source:
        for source in _entry(entry, data=data, left_out=left_out):
            key = source.path if source.format == "datasets" else str(Path(source.path).resolve())
            if not source.size and source.format != "datasets":
                left_out["empty"] += 1
            elif by_path.setdefault(key, source) is not source:
                left_out["named twice"] += 1
    if not by_path:
        raise refusal(
            "data.source",
            data.source,
            f"no text in it (data.pattern={data.pattern or ' '.join(patterns(data))})",
            allowed=ALLOWED,
            instead="another data.pattern or data.source",
        )
    before = _held_out_before(data)
    return Listing(
        _split(list(by_path.values()), fraction=data.eval_fraction, before=before),
        dict(sorted(left_out.items())),
        _tokenizer_digest(data),
        before,
    )


def _tokenizer_digest(data: DataConfig) -> str:
    path = Path(data.tokenizer)
    folder = path.parent if path.is_file() else path
    if (
        data.tokenizer == "train"
        or not folder.is_dir()
        or Path(data.path).resolve() in folder.resolve().parents
    ):
        return ""
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _entry(entry: str, *, data: DataConfig, left_out: Counter[str]) -> Iterator[Source]:
    """The sources of one entry of `data.source`, sorted by name."""
    path = Path(entry)
    is_saved = data.format in ("auto", *PACKED_FORMATS) and any(
        (path / name).is_file() for name in ("dataset_dict.json", "state.json")
    )
    is_hub_id = (
        data.format in PACKED_FORMATS
        and not path.exists()
        and not glob.has_magic(entry)
        and format_of(path) is None
    )
    if data.format == "datasets" or is_saved or is_hub_id:
        yield Source(
            name=path.name,
            path=str(path) if path.exists() else entry,
            format="datasets",
            size=0,
            version=_folder_version(path) if path.is_dir() else "",
            held_out=None,
            blocks="",
            compression="",
        )
        return
    for name, file in sorted(files_of(entry, path=path, data=data, left_out=left_out)):
        kind = (
            data.format
            if data.format in ENDINGS
            else format_of(file) or ("jsonl" if data.format in PACKED_FORMATS else "text")
        )
        stat = file.stat()
        yield Source(
            name=name,
            path=str(file),
            format=kind,
            size=stat.st_size * (INFLATION if file.suffix in COMPRESSED else 1),
            version=platform.python_version() if entry == STDLIB else str(stat.st_mtime_ns),
            held_out=False if kind == "text" else None,
            blocks="",
            compression="",
        )


def _folder_version(folder: Path) -> str:
    """A hash that changes with any file in the folder."""
    stats = sorted(
        (name, os.stat(os.path.join(at, name))) for at, _, names in os.walk(folder) for name in names
    )
    return hashlib.sha256(
        json.dumps([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]).encode()
    ).hexdigest()


def _split(sources: list[Source], *, fraction: float, before: Mapping[str, str]) -> list[Source]:
    """Hold out text files whose name hashes below `fraction`, and blocks of those that are a large
    part of the corpus.

    Adding or removing files does not move others between splits: files in `before`, the `held_out` of an
    earlier `prepare`, stay held out. Neither split is empty if there is enough text and fraction > 0.
    """
    texts = [source for source in sources if source.format == "text"]
    if fraction == 0 or not texts:
        return sources
    total = sum(source.size for source in sources)
    places = {source.path: share(_name_digest(source)) for source in texts}
    how: dict[str, str] = {}
    for source in texts:
        old = before.get(source.name)
        if old in (BY_CHANCE, SURELY) or blocks.is_long(source.size, total=total):
            how[source.path] = old if old in (BY_CHANCE, SURELY) else BY_CHANCE
        elif places[source.path] < fraction or old == WHOLE:
            how[source.path] = WHOLE
    long = [source for source in texts if how.get(source.path, WHOLE) != WHOLE]
    none = not any(kind != BY_CHANCE for kind in how.values()) and not any(
        _has_block(source, fraction=fraction) for source in long
    )
    if none and (long or len(texts) > 1):
        chosen = min(long or texts, key=lambda source: places[source.path]).path
        how[chosen] = SURELY if long else WHOLE
    if not long and len(how) == len(texts):
        how.pop(max(places, key=places.__getitem__))
    return [
        replace(source, held_out=how.get(source.path) == WHOLE, blocks=_blocks(how.get(source.path)))
        if source.format == "text"
        else source
        for source in sources
    ]


def _blocks(how: str | None) -> str:
    return how if how in (BY_CHANCE, SURELY) else ""


def _has_block(source: Source, *, fraction: float) -> bool:
    return next(blocks.places(source.name, fraction=fraction, how=BY_CHANCE))[1] <= source.size


def _held_out_before(data: DataConfig) -> dict[str, str]:
    """`Listing.held_out` of an earlier `prepare` of this folder with the same fraction; else empty."""
    try:
        record = json.loads((Path(data.path) / "corpus.json").read_bytes())
        same = record["settings"]["eval_fraction"] == data.eval_fraction
        return (
            {name: how for name, how in record["held_out"].items() if how in (BY_CHANCE, SURELY, WHOLE)}
            if same
            else {}
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
