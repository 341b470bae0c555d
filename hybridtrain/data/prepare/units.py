"""Types that readers and pieces share: the fields to read, a range of a source, a record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from hybridtrain.config.schema import DataConfig
from hybridtrain.data.prepare import conversations
from hybridtrain.data.prepare.answers import FIELDS
from hybridtrain.data.prepare.sources import ANSWERS, CHAT, LABELLED, LABELLED_WORDS, Source


@dataclass(frozen=True)
class Fields:
    """The fields of a record that hold the document, and the part of a dataset to read."""

    key: str
    option: str
    """The option that names `key`."""
    label: str
    """Field of the label; empty: none is read."""
    config: str
    split: str
    encoding: str
    full_records: bool
    """Whether to return full records instead of the field `key`: conversations have several forms."""
    record: tuple[str, ...]
    """Fields of a full record; empty: those of conversations."""

    @classmethod
    def of(cls, data: DataConfig) -> Fields:
        key, option = (
            (data.messages_key, "data.messages_key")
            if data.format == "chat"
            else (data.text_key, "data.text_key")
        )
        if data.format == ANSWERS:
            key, option = "context", "data.source"
        label = data.label_key if data.format in (LABELLED, LABELLED_WORDS) else ""
        return cls(
            key=key,
            option=option,
            label=label,
            config=data.dataset_config,
            split=data.dataset_split,
            encoding=data.encoding,
            full_records=data.format in (CHAT, ANSWERS),
            record=FIELDS if data.format == ANSWERS else (),
        )

    def columns(self, names: list[str]) -> list[str]:
        """The columns to read, from the names of all columns."""
        if self.full_records:
            return [name for name in names if name in (self.record or conversations.fields(self.key))]
        return [self.key, *([self.label] if self.label else [])]


@dataclass(frozen=True, slots=True)
class Unit:
    """A range of a source that can be read by itself.

    `start` and `stop` count bytes (jsonl), row groups (parquet) or rows (datasets); a text file is one unit.
    """

    source: Source
    fields: Fields
    start: int
    stop: int
    size: int
    """Approximate bytes of text."""


class Record(NamedTuple):
    """One record of a unit: its value, or the problem that prevents reading it."""

    number: int
    """Within the unit, from 0."""
    value: Any
    problem: str
    instead: str = ""
    """What to try about the problem; empty: another field, or skipping the record."""
