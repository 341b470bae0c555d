"""Reads the records of all formats: `units_of` divides a source into units, `records` streams
the records of one.

    text        the whole file, one record
    jsonl       the lines that begin in a range of bytes
    json        the elements of an array, or indented objects
    parquet     the rows of some row groups
    datasets    a range of rows

Memory holds at most one text file, one line, one element or one small batch of rows (tables.py) at a time.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from hybridtrain.data.prepare import conversations, streams, tables
from hybridtrain.data.prepare.sources import INFLATION, Source
from hybridtrain.data.prepare.streams import READ_BYTES, UTF8
from hybridtrain.data.prepare.units import Fields, Record, Unit
from hybridtrain.errors import UserError, refusal
from hybridtrain.runtime.files import is_lfs_pointer, lfs_pointer

ENCODINGS = "any that Python knows: latin-1, cp1251, koi8-r, gb18030, utf-16, ..."
SKIP = "prepare.skip_bad=true to leave such records out"


def open_source(source: Source, *, fields: Fields) -> Source:
    """The source with the facts that need its content: format, compression, approximate
    bytes of text, version.

    Raises UserError for a damaged source, a wrong format or encoding, a missing package or column.
    """
    if source.format in ("parquet", "datasets") and fields.encoding != UTF8:
        allowed = "text and JSONL, in any encoding"
        raise refusal(
            "data.encoding",
            fields.encoding,
            f"{source.path} is {source.format}, which has its own",
            allowed=allowed,
            instead="no data.encoding",
        )
    if source.format == "datasets":
        return tables.open_dataset(source, fields)
    if is_lfs_pointer(Path(source.path)):
        raise lfs_pointer("data.source", Path(source.path))
    if source.format == "parquet":
        return tables.open_parquet(source, fields)
    with _readable(source, fields):
        compression = streams.compression(source.path)
        start = streams.head(source.path, compression=compression)
    streams.check_beginning(source.path, start, encoding=fields.encoding)
    size = Path(source.path).stat().st_size * (INFLATION if compression else 1)
    values = source.format == "jsonl" and streams.holds_values(start, encoding=fields.encoding)
    return replace(source, size=size, compression=compression, format="json" if values else source.format)


def units_of(source: Source, *, fields: Fields, limit: int) -> Iterator[Unit]:
    """Units of about `limit` bytes of text; one unit for a source that can only be read
    from its beginning."""

    def unit(start: int, stop: int, size: int) -> Unit:
        return Unit(source=source, fields=fields, start=start, stop=stop, size=size)

    if source.format == "datasets":
        rows = len(tables.dataset_of(source, fields))
        step = max(1, rows * limit // source.size)
        yield from (
            unit(start, min(start + step, rows), source.size * min(step, rows - start) // rows)
            for start in range(0, rows, step)
        )
    elif source.format == "parquet":
        metadata = tables.parquet_file(source).metadata
        start = size = 0
        for group in range(metadata.num_row_groups):
            size += metadata.row_group(group).total_byte_size
            if size >= limit or group == metadata.num_row_groups - 1:
                yield unit(start, group + 1, size)
                start, size = group + 1, 0
    elif source.format == "jsonl" and not source.compression and fields.encoding == UTF8:
        yield from (
            unit(start, min(start + limit, source.size), min(limit, source.size - start))
            for start in range(0, source.size, limit)
        )
    else:
        yield unit(0, source.size, source.size)


def records(unit: Unit) -> Iterator[Record]:
    """The records of a unit, in order. Raises UserError if the file is damaged."""
    read = {
        "text": _text,
        "jsonl": _jsonl,
        "json": _json,
        "parquet": tables.parquet_rows,
        "datasets": tables.dataset_rows,
    }[unit.source.format]
    with _readable(unit.source, unit.fields):
        yield from read(unit)


@contextmanager
def _readable(source: Source, fields: Fields) -> Iterator[None]:
    """Raise UserError, naming the file, for the errors of gzip, zstd, pyarrow and decoding."""
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError as error:
        problem, allowed = (
            f"it has bytes that are no text in {fields.encoding} ({error.reason})",
            f"text in {fields.encoding}",
        )
        raise refusal(
            "data.source", source.path, problem, allowed=allowed, instead=f"data.encoding=NAME, {ENCODINGS}"
        ) from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise refusal(
            "data.source",
            source.path,
            f"it cannot be read as {source.format} ({type(error).__name__}: {error})",
            allowed="complete, undamaged files",
            instead="a new copy of the file, or another data.format",
        ) from error


def where(unit: Unit, number: int) -> str:
    """The place of a record for messages: file and line, or file and row."""
    path = unit.source.path
    if unit.source.format == "text":
        return path
    if unit.source.format == "jsonl":
        return f"{path} line {_lines_before(path, unit.start) + number + 1}"
    if unit.source.format == "json":
        return f"{path} element {number + 1}"
    if unit.source.format == "parquet":
        metadata = tables.parquet_file(unit.source).metadata
        return f"{path} row {sum(metadata.row_group(group).num_rows for group in range(unit.start)) + number}"
    return f"{path} row {unit.start + number}"


def _text(unit: Unit) -> Iterator[Record]:
    """The decoded file.

    A few bytes that cannot be decoded become U+FFFD, which `prepare` counts and reports.
    """
    content, problem = streams.text(
        unit.source.path, compression=unit.source.compression, encoding=unit.fields.encoding
    )
    yield Record(0, content, problem, f"data.encoding=NAME, {ENCODINGS}; or {SKIP}")


def _jsonl(unit: Unit) -> Iterator[Record]:
    source, encoding = unit.source, unit.fields.encoding
    if source.compression or encoding != UTF8:
        yield from _parse(
            streams.lines(source.path, compression=source.compression, encoding=encoding), unit=unit
        )
    else:
        with streams.opened(source.path, compression="") as file:
            yield from _parse(_lines_from(file, start=unit.start, stop=unit.stop), unit=unit)


def _json(unit: Unit) -> Iterator[Record]:
    source = unit.source
    values = streams.values(source.path, compression=source.compression, encoding=unit.fields.encoding)
    return (_record(number, value, fields=unit.fields) for number, value in enumerate(values))


def _lines_from(file: BinaryIO, *, start: int, stop: int) -> Iterator[bytes]:
    """The lines that begin in the bytes [start, stop): adjacent ranges give every line exactly once."""
    at = start
    if start:
        file.seek(start - 1)
        at = start - 1 + len(file.readline())  # skips the line that began before `start`
    while at < stop and (line := file.readline()):
        yield line
        at += len(line)


def _parse(lines: Iterable[bytes], *, unit: Unit) -> Iterator[Record]:
    for number, line in enumerate(lines):
        if line.strip():
            try:
                value = json.loads(line)
            except RecursionError:
                yield Record(number, None, "it is not JSON (its brackets are nested too deeply)", SKIP)
            except ValueError as error:
                yield Record(
                    number,
                    None,
                    f"it is not JSON ({error})",
                    _suggestion(line, first=unit.start == number == 0),
                )
            else:
                yield _record(number, value, fields=unit.fields)


def _suggestion(line: bytes, *, first: bool) -> str:
    """What to try about a line that is not JSON.

    `first`: then probably no line is, and skipping them does not help.
    """
    if b"}\r{" in line:
        return "line ends of LF, not CR alone: tr '\\r' '\\n' < FILE > FILE.jsonl"
    if first and not line.lstrip(b"\xef\xbb\xbf \t").startswith(b"{"):
        return (
            "data.format=text for plain text; "
            "a CSV file becomes Parquet by pandas: read_csv(FILE).to_parquet('FILE.parquet')"
        )
    try:
        line.decode()
    except UnicodeDecodeError:
        return f"data.encoding=NAME of the file's encoding, or {SKIP}"
    return "a whole JSON object on each line, without a comma after the last field" + (
        "" if first else f"; or {SKIP}"
    )


def _record(number: int, record: Any, *, fields: Fields) -> Record:
    key = fields.key
    if not isinstance(record, dict):
        return Record(number, None, f"it is no object but {conversations.kind(record)}")
    if fields.full_records:
        return Record(number, record, "")
    for name in (key, *([fields.label] if fields.label else [])):
        if record.get(name) is None:
            names = ", ".join(map(repr, itertools.islice(record, 8))) or "none"
            return Record(number, None, f"its field {name!r} is missing or null (its fields: {names})")
    return Record(number, (record[key], record[fields.label]) if fields.label else record[key], "")


@lru_cache(maxsize=4)
def _lines_before(path: str, stop: int) -> int:
    """Number of lines that begin in the first `stop` bytes."""
    lines = 0
    with Path(path).open("rb") as file:
        for at in range(0, stop, READ_BYTES):
            block = file.read(min(READ_BYTES, stop - at))
            lines += block.count(b"\n")
    return lines + (stop > 0 and not block.endswith(b"\n"))
