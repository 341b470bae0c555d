"""The command that prepares a folder again, for messages about a damaged or missing corpus."""

from __future__ import annotations

import contextlib
import re
import shlex
from pathlib import Path
from typing import Any

from hybridtrain.config import words
from hybridtrain.config.schema import DataConfig
from hybridtrain.errors import UserError
from hybridtrain.runtime.files import read_object

_RECORDS = (("corpus.json", " prepare.overwrite=true"), (".partial/plan.json", ""))
"""File with the settings of a complete or interrupted prepare -> options needed to write there again."""
_PLAIN = re.compile(r"[\w./~-]+")


def for_folder(folder: Path) -> str:
    """The command, with source and settings from the folder's records, so that it does not
    make a different corpus.
    """
    start = f"hybridtrain prepare {_word('data.path', str(folder))}"
    for name, more in _RECORDS:
        with contextlib.suppress(UserError, KeyError):
            settings = read_object(folder / name, field="data.path")["settings"]
            if options := _options(settings):
                return f"{start} {options}{more}"
    holds = folder.is_dir() and any(folder.iterdir())
    return f"{start} data.source=[YOUR TEXT]" + (
        ", with prepare.overwrite=true if it holds an earlier corpus" if holds else ""
    )


def _options(settings: Any) -> str:
    """Recorded settings as options, without defaults; "" if they have no source."""
    source = settings.get("source") if isinstance(settings, dict) else None
    if not isinstance(source, list) or not source or not all(isinstance(entry, str) for entry in source):
        return ""
    standard = vars(DataConfig())
    others = {
        name: value
        for name, value in settings.items()
        if name != "source" and type(value) is type(standard.get(name)) and value != standard[name]
    }
    return " ".join(_word(f"data.{name}", value) for name, value in {"source": source, **others}.items())


def _word(option: str, value: Any) -> str:
    """`option=value` as a word of a command line, quoted for the shell and for Hydra's grammar if needed."""
    if isinstance(value, list):
        text = (
            "["
            + ",".join(entry if _PLAIN.fullmatch(entry) else words.literal(entry) for entry in value)
            + "]"
        )
    else:
        text = str(value).lower() if isinstance(value, bool) else str(value)
    word = f"{option}={text}"
    return word if re.fullmatch(r"[\w.=/,~:\[\]-]+", word) else shlex.quote(word)
