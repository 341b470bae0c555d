"""The tokenizer of prepared data, by corpus.json alone: what ends a text, and an answer of a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridtrain.config.schema import DataConfig
from hybridtrain.runtime.files import read_object


def records(data: DataConfig) -> list[dict[str, Any]]:
    """corpus.json of data.path or of each corpus of data.blend, where it is there. Raises UserError for one that cannot be read."""
    files = [Path(path) / "corpus.json" for path in data.blend or [data.path] if path]
    return [read_object(file, field="data.path") for file in files if file.is_file()]


def end_tokens(facts: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Of a corpus.json: ids of the tokens that end a text and an answer of a conversation; None where there is none, or it is not known."""
    template = facts.get("template")
    turn = template.get("end_of_turn_id") if isinstance(template, dict) else None
    return facts.get("eos_id"), turn if type(turn) is int else None
