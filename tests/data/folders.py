"""A small corpus to prepare into a folder, and what lies in the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hybridtrain.config.schema import DataConfig, PrepareConfig
from hybridtrain.data.prepare import tokenize
from hybridtrain.errors import UserError

NEW, AGAIN = PrepareConfig(), PrepareConfig(overwrite=True)


def few_texts(folder: Path) -> Path:
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"some words and number {number} " * 50)
    return folder


def settings(path: Path, source: Path, **fields: object) -> DataConfig:
    return DataConfig(
        path=str(path), source=[str(source)], **{"vocab_size": 270, "eval_fraction": 0.3} | fields
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refused(data: DataConfig, *, options: PrepareConfig) -> str:
    with pytest.raises(UserError) as error:
        tokenize.prepare(data, options=options)
    return str(error.value)


def as_before_records(folder: Path) -> None:
    """What an earlier version left: no record, and a corpus.json without what was added since."""
    (folder / ".prepare.json").unlink()
    facts = json.loads((folder / "corpus.json").read_text())
    for name in ("sources", "digests", "left_out"):
        facts.pop(name)
    (folder / "corpus.json").write_text(json.dumps(facts))
