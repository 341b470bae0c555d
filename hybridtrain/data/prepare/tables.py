"""Reads the formats with columns: Parquet files and Hugging Face datasets. Their packages are optional."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from hybridtrain.data.prepare import conversations, streams
from hybridtrain.data.prepare.sources import Source
from hybridtrain.data.prepare.units import Fields, Record, Unit
from hybridtrain.errors import refusal

ROWS_AT_ONCE = 256


def open_parquet(source: Source, fields: Fields) -> Source:
    """The source with its size. Raises UserError if it lacks a column to read."""
    file = parquet_file(source)
    _check_column(source, fields, columns=file.schema_arrow.names)
    return replace(
        source,
        size=max(
            1,
            sum(
                file.metadata.row_group(group).total_byte_size
                for group in range(file.metadata.num_row_groups)
            ),
        ),
    )


def open_dataset(source: Source, fields: Fields) -> Source:
    """The source with its size and version. Raises UserError if it lacks a column to read."""
    dataset = dataset_of(source, fields)
    _check_column(source, fields, columns=dataset.column_names)
    return replace(source, size=max(1, dataset.data.nbytes), version=dataset._fingerprint)


def parquet_rows(unit: Unit) -> Iterator[Record]:
    """The records of a unit of row groups."""
    groups, file = range(unit.start, unit.stop), parquet_file(unit.source)
    names = file.schema_arrow.names
    batches = file.iter_batches(
        batch_size=ROWS_AT_ONCE, row_groups=list(groups), columns=unit.fields.columns(names)
    )
    yield from _rows((row for batch in batches for row in batch.to_pylist()), fields=unit.fields, names=names)


def dataset_rows(unit: Unit) -> Iterator[Record]:
    """The records of a unit of rows."""
    dataset = dataset_of(unit.source, unit.fields)
    chosen = dataset.select_columns(unit.fields.columns(dataset.column_names))
    starts = range(unit.start, unit.stop, ROWS_AT_ONCE)
    blocks = (chosen[start : min(start + ROWS_AT_ONCE, unit.stop)] for start in starts)
    rows = (
        dict(zip(block, values, strict=True))
        for block in blocks
        for values in zip(*block.values(), strict=True)
    )
    yield from _rows(rows, fields=unit.fields, names=dataset.column_names)


def _rows(rows: Iterable[dict[str, Any]], *, fields: Fields, names: list[str]) -> Iterator[Record]:
    """Records from rows of the columns that are read.

    Full records also contain the other columns' names, with ... for values.
    """
    others = dict.fromkeys(
        name for name in names if fields.full_records and name not in fields.columns(names)
    )
    for number, row in enumerate(rows):
        missing = next(
            (
                name
                for name in (fields.key, fields.label)
                if name and not fields.full_records and row[name] is None
            ),
            None,
        )
        if fields.full_records:
            value: Any = {**row, **dict.fromkeys(others, ...)}
        else:
            value = (row[fields.key], row[fields.label]) if fields.label else row[fields.key]
        yield Record(number, value, f"its field {missing!r} is empty (null)" if missing else "")


@lru_cache(maxsize=8)
def parquet_file(source: Source) -> Any:
    """The open Parquet file. Raises UserError if it is damaged."""
    pyarrow, parquet = streams.package("pyarrow"), streams.package("pyarrow.parquet")
    try:
        return parquet.ParquetFile(source.path)
    except (OSError, pyarrow.ArrowException) as error:
        raise refusal(
            "data.source",
            source.path,
            f"it cannot be read as Parquet ({error})",
            allowed="complete Parquet files",
            instead="another data.format",
        ) from error


@lru_cache(maxsize=8)
def dataset_of(source: Source, fields: Fields) -> Any:
    """The memory-mapped dataset, from a folder of `save_to_disk` or through `load_dataset`.

    Raises UserError.
    """
    datasets = streams.package("datasets")
    folder = Path(source.path)
    try:
        if (folder / "state.json").is_file():
            return datasets.load_from_disk(source.path)
        if not (folder / "dataset_dict.json").is_file():
            return datasets.load_dataset(source.path, name=fields.config or None, split=fields.split)
        splits = datasets.load_from_disk(source.path)
    except Exception as error:  # the library raises exceptions of many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise refusal(
            "data.source",
            source.path,
            f"datasets cannot load it ({type(error).__name__}: {reason})",
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
        allowed, instead = (
            "columns with names of their own",
            f"the file with one of them renamed, or another {fields.option}",
        )
        raise refusal(
            fields.option,
            fields.key,
            f"{source.path} has {columns.count(fields.key)} columns of this name",
            allowed=allowed,
            instead=instead,
        )
    if fields.full_records and not fields.record and conversations.has_form(columns, key=fields.key):
        return
    for option, name in ((fields.option, fields.key), ("data.label_key", fields.label)):
        if name and name not in columns:
            raise refusal(
                option,
                name,
                f"{source.path} has no such column",
                allowed=", ".join(columns),
                instead=f"{option}={columns[0]}",
            )
