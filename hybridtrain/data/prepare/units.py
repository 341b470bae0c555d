"""What readers and pieces share: the fields that are read, a restartable range of a source, its records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from hybridtrain.config.schema import DataConfig
from hybridtrain.data.prepare import conversations
from hybridtrain.data.prepare.sources import Source


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
