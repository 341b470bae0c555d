"""One reader per format behind one record: a `Unit` is a restartable range of a source, `records` streams what lies in it.

    text        the whole file, one record                     jsonl     the lines that begin in a range of bytes
    json        the elements of an array, or indented objects  parquet   the rows of some row groups
    datasets    a range of rows

Nothing is read whole but one text file, one line, one element or one small batch of rows. pyarrow and datasets are optional packages.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from hybridtrain.config.schema import DataConfig
from hybridtrain.data.prepare import conversations, streams
from hybridtrain.data.prepare.sources import INFLATION, Source
from hybridtrain.data.prepare.streams import READ_BYTES, UTF8
from hybridtrain.errors import UserError, refusal
from hybridtrain.runtime.files import is_lfs_pointer, lfs_pointer

ROWS_AT_ONCE = 256  # of Parquet or a dataset
ENCODINGS = "any that Python knows: latin-1, cp1251, koi8-r, gb18030, utf-16, ..."
SKIP = "prepare.skip_bad=true to leave such records out"


@dataclass(frozen=True)
class Fields:
    """Where the documents stand in a record, and which part of a dataset is read."""

    key: str
    option: str
    """The option that names `key`."""
    label: str
    """Field of a label, which is read beside `key`; empty: none is."""
    config: str
    split: str
    encoding: str
    whole: bool
    """Records are given whole (conversations have more than one form), not their field `key` alone."""

    @classmethod
    def of(cls, data: DataConfig) -> Fields:
        key, option = (data.messages_key, "data.messages_key") if data.format == "chat" else (data.text_key, "data.text_key")
        label = data.label_key if data.format == "labelled" else ""
        whole = data.format == "chat"
        return cls(key=key, option=option, label=label, config=data.dataset_config, split=data.dataset_split, encoding=data.encoding, whole=whole)

    def columns(self, there: list[str]) -> list[str]:
        """Which of the columns are read."""
        if self.whole:
            return [name for name in there if name in conversations.fields(self.key)]
        return [self.key, *([self.label] if self.label else [])]


@dataclass(frozen=True, slots=True)
class Unit:
    """A range of a source that is read from its start: bytes (jsonl), row groups (parquet), rows (datasets), or all of it (text)."""

    source: Source
    fields: Fields
    start: int
    stop: int
    size: int
    """Bytes of text in it, about."""


class Record(NamedTuple):
    """One record of a unit: its value, or why it cannot be read."""

    number: int
    """Within the unit, from 0."""
    value: Any
    problem: str
    instead: str = ""
    """What to try where there is a problem; empty: another field, or leaving it out."""


def open_source(source: Source, *, fields: Fields) -> Source:
    """The source with what only its own bytes tell: its format and compression, its bytes of text (about), its version.

    Raises UserError for what is damaged or not of its format or encoding, for a missing package, and where there is no such column.
    """
    if source.format in ("parquet", "datasets") and fields.encoding != UTF8:
        allowed = "text and JSONL, in any encoding"
        raise refusal("data.encoding", fields.encoding, f"{source.path} is {source.format}, which has its own", allowed=allowed, instead="no data.encoding")
    if source.format == "datasets":
        dataset = _dataset(source, fields)
        _check_column(source, fields, columns=dataset.column_names)
        return replace(source, size=max(1, dataset.data.nbytes), version=dataset._fingerprint)  # the library's own identity of the content
    if is_lfs_pointer(Path(source.path)):
        raise lfs_pointer("data.source", Path(source.path))
    if source.format == "parquet":
        file = _parquet(source)
        _check_column(source, fields, columns=file.schema_arrow.names)
        return replace(source, size=max(1, sum(file.metadata.row_group(group).total_byte_size for group in range(file.metadata.num_row_groups))))
    with _readable(source, fields):
        packed = streams.compression(source.path)
        start = streams.head(source.path, packed=packed)
    streams.check_beginning(source.path, start, encoding=fields.encoding)
    size = Path(source.path).stat().st_size * (INFLATION if packed else 1)
    values = source.format == "jsonl" and streams.holds_values(start, encoding=fields.encoding)
    return replace(source, size=size, packed=packed, format="json" if values else source.format)


def cut(source: Source, *, fields: Fields, limit: int) -> Iterator[Unit]:
    """The source in units of about `limit` bytes of text; what cannot be entered in the middle is one unit."""

    def unit(start: int, stop: int, size: int) -> Unit:
        return Unit(source=source, fields=fields, start=start, stop=stop, size=size)

    if source.format == "datasets":
        rows = len(_dataset(source, fields))
        step = max(1, rows * limit // source.size)
        yield from (unit(start, min(start + step, rows), source.size * min(step, rows - start) // rows) for start in range(0, rows, step))
    elif source.format == "parquet":
        metadata = _parquet(source).metadata
        start = size = 0
        for group in range(metadata.num_row_groups):
            size += metadata.row_group(group).total_byte_size
            if size >= limit or group == metadata.num_row_groups - 1:
                yield unit(start, group + 1, size)
                start, size = group + 1, 0
    elif source.format == "jsonl" and not source.packed and fields.encoding == UTF8:
        yield from (unit(start, min(start + limit, source.size), min(limit, source.size - start)) for start in range(0, source.size, limit))
    else:
        yield unit(0, source.size, source.size)


def records(unit: Unit) -> Iterator[Record]:
    """The records of a unit, in order. Raises UserError where the file itself cannot be read on."""
    read = {"text": _text, "jsonl": _jsonl, "json": _json, "parquet": _parquet_rows, "datasets": _dataset_rows}[unit.source.format]
    with _readable(unit.source, unit.fields):
        yield from read(unit)


@contextmanager
def _readable(source: Source, fields: Fields) -> Iterator[None]:
    """Damage, as gzip, zstd and pyarrow name it, is refused with the file."""
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError as error:
        words, allowed = f"it has bytes that are no text in {fields.encoding} ({error.reason})", f"text in {fields.encoding}"
        raise refusal("data.source", source.path, words, allowed=allowed, instead=f"data.encoding=NAME, {ENCODINGS}") from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise refusal(
            "data.source",
            source.path,
            f"it cannot be read as {source.format} ({type(error).__name__}: {error})",
            allowed="complete, undamaged files",
            instead="the file once more from where it came, or another data.format",
        ) from error


def where(unit: Unit, number: int) -> str:
    """The place of a record, for people: file and line, or file and row."""
    path = unit.source.path
    if unit.source.format == "text":
        return path
    if unit.source.format == "jsonl":
        return f"{path} line {_lines_before(path, unit.start) + number + 1}"
    if unit.source.format == "json":
        return f"{path} element {number + 1}"
    if unit.source.format == "parquet":
        metadata = _parquet(unit.source).metadata
        return f"{path} row {sum(metadata.row_group(group).num_rows for group in range(unit.start)) + number}"
    return f"{path} row {unit.start + number}"


def _text(unit: Unit) -> Iterator[Record]:
    """A file, decoded; a few bytes that are no text become U+FFFD, which `prepare` counts and reports."""
    content, problem = streams.text(unit.source.path, packed=unit.source.packed, encoding=unit.fields.encoding)
    yield Record(0, content, problem, f"data.encoding=NAME, {ENCODINGS}; or {SKIP}")


def _jsonl(unit: Unit) -> Iterator[Record]:
    source, encoding = unit.source, unit.fields.encoding
    if source.packed or encoding != UTF8:
        yield from _parsed(streams.lines(source.path, packed=source.packed, encoding=encoding), unit=unit)
    else:
        with streams.opened(source.path, packed="") as file:
            yield from _parsed(_lines_from(file, start=unit.start, stop=unit.stop), unit=unit)


def _json(unit: Unit) -> Iterator[Record]:
    source = unit.source
    values = streams.values(source.path, packed=source.packed, encoding=unit.fields.encoding)
    return (_record(number, value, fields=unit.fields) for number, value in enumerate(values))


def _lines_from(file: BinaryIO, *, start: int, stop: int) -> Iterator[bytes]:
    """The lines that begin in the bytes [start, stop), so that ranges side by side give every line once."""
    at = start
    if start:
        file.seek(start - 1)
        at = start - 1 + len(file.readline())  # the end of the line that began before
    while at < stop and (line := file.readline()):
        yield line
        at += len(line)


def _parsed(lines: Iterable[bytes], *, unit: Unit) -> Iterator[Record]:
    for number, line in enumerate(lines):
        if line.strip():
            try:
                value = json.loads(line)
            except RecursionError:
                yield Record(number, None, "it is not JSON (its brackets are nested too deeply)", SKIP)
            except ValueError as error:
                yield Record(number, None, f"it is not JSON ({error})", _advice(line, first=unit.start == number == 0))
            else:
                yield _record(number, value, fields=unit.fields)


def _advice(line: bytes, *, first: bool) -> str:
    """What to try with a line that is not JSON; where it is the first, all are likely to be so, and leaving them out is no advice."""
    if b"}\r{" in line:
        return "line ends of LF, not CR alone: tr '\\r' '\\n' < FILE > FILE.jsonl"
    if first and not line.lstrip(b"\xef\xbb\xbf \t").startswith(b"{"):
        return "data.format=text for plain text; a CSV file becomes Parquet by pandas: read_csv(FILE).to_parquet('FILE.parquet')"
    try:
        line.decode()
    except UnicodeDecodeError:
        return f"data.encoding=NAME of the file's encoding, or {SKIP}"
    return "a whole JSON object on each line, without a comma after the last field" + ("" if first else f"; or {SKIP}")


def _record(number: int, record: Any, *, fields: Fields) -> Record:
    key = fields.key
    if not isinstance(record, dict):
        return Record(number, None, f"it is no object but {conversations.kind(record)}")
    if fields.whole:
        return Record(number, record, "")
    for name in (key, *([fields.label] if fields.label else [])):
        if record.get(name) is None:
            return Record(number, None, f"its field {name!r} is missing or null (its fields: {', '.join(map(repr, itertools.islice(record, 8))) or 'none'})")
    return Record(number, (record[key], record[fields.label]) if fields.label else record[key], "")


def _parquet_rows(unit: Unit) -> Iterator[Record]:
    groups, file = range(unit.start, unit.stop), _parquet(unit.source)
    names = file.schema_arrow.names
    batches = file.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=list(groups), columns=unit.fields.columns(names))
    yield from _rows((row for batch in batches for row in batch.to_pylist()), fields=unit.fields, names=names)


def _dataset_rows(unit: Unit) -> Iterator[Record]:
    dataset = _dataset(unit.source, unit.fields)
    chosen = dataset.select_columns(unit.fields.columns(dataset.column_names))
    starts = range(unit.start, unit.stop, ROWS_AT_ONCE)
    blocks = (chosen[start : min(start + ROWS_AT_ONCE, unit.stop)] for start in starts)
    rows = (dict(zip(block, values, strict=True)) for block in blocks for values in zip(*block.values(), strict=True))
    yield from _rows(rows, fields=unit.fields, names=dataset.column_names)


def _rows(rows: Iterable[dict[str, Any]], *, fields: Fields, names: list[str]) -> Iterator[Record]:
    """Records of rows that have the columns that are read; the names of the others stand in a whole record, without their values."""
    others = dict.fromkeys(name for name in names if fields.whole and name not in fields.columns(names))
    for number, row in enumerate(rows):
        missing = next((name for name in (fields.key, fields.label) if name and not fields.whole and row[name] is None), None)
        value = {**row, **dict.fromkeys(others, ...)} if fields.whole else (row[fields.key], row[fields.label]) if fields.label else row[fields.key]
        yield Record(number, value, f"its field {missing!r} is empty (null)" if missing else "")


@lru_cache(maxsize=4)
def _lines_before(path: str, stop: int) -> int:
    """Line ends in the first `stop` bytes, and the line that begins before `stop` and ends after it."""
    lines = 0
    with Path(path).open("rb") as file:
        for at in range(0, stop, READ_BYTES):
            block = file.read(min(READ_BYTES, stop - at))
            lines += block.count(b"\n")
    return lines + (stop > 0 and not block.endswith(b"\n"))


@lru_cache(maxsize=8)
def _parquet(source: Source) -> Any:
    """The open Parquet file, for its metadata and its rows."""
    pyarrow, parquet = streams.package("pyarrow"), streams.package("pyarrow.parquet")
    try:
        return parquet.ParquetFile(source.path)
    except (OSError, pyarrow.ArrowException) as error:
        raise refusal(
            "data.source", source.path, f"it cannot be read as Parquet ({error})", allowed="complete Parquet files", instead="another data.format"
        ) from error


@lru_cache(maxsize=8)
def _dataset(source: Source, fields: Fields) -> Any:
    """The dataset, from the folder that `save_to_disk` wrote, or through `load_dataset`; its library keeps it on disk, memory-mapped."""
    datasets = streams.package("datasets")
    folder = Path(source.path)
    try:
        if (folder / "state.json").is_file():
            return datasets.load_from_disk(source.path)
        if not (folder / "dataset_dict.json").is_file():
            return datasets.load_dataset(source.path, name=fields.config or None, split=fields.split)
        splits = datasets.load_from_disk(source.path)
    except Exception as error:  # the library raises its own, huggingface_hub's and plain ones
        raise refusal(
            "data.source",
            source.path,
            f"datasets cannot load it ({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'})",
            allowed="a folder that save_to_disk wrote or load_dataset reads, or a hub id that can be reached",
            instead="the folder of a local copy, or another data.dataset_config or data.dataset_split",
        ) from error
    if fields.split not in splits:
        raise refusal(
            "data.dataset_split",
            fields.split,
            f"{source.path} has no such split",
            allowed=", ".join(splits),
            instead=f"data.dataset_split={next(iter(splits))}",
        )
    return splits[fields.split]


def _check_column(source: Source, fields: Fields, *, columns: list[str]) -> None:
    if columns.count(fields.key) > 1:
        allowed, instead = "columns with names of their own", f"the file with one of them renamed, or another {fields.option}"
        raise refusal(fields.option, fields.key, f"{source.path} has {columns.count(fields.key)} columns of this name", allowed=allowed, instead=instead)
    if fields.whole and conversations.has_form(columns, key=fields.key):
        return
    for option, name in ((fields.option, fields.key), ("data.label_key", fields.label)):
        if name and name not in columns:
            raise refusal(option, name, f"{source.path} has no such column", allowed=", ".join(columns), instead=f"{option}={columns[0]}")
