"""Checks whether a folder is prepared already: complete, with the same settings and from the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hybridtrain.config.schema import DataConfig
from hybridtrain.data.corpus import Corpus, changed_files
from hybridtrain.data.prepare import folder, sources
from hybridtrain.data.prepare.progress import say
from hybridtrain.errors import UserError, refusal
from hybridtrain.runtime.files import read_json


def settings_of(data: DataConfig) -> dict[str, Any]:
    """The options that determine the token files, apart from the text itself."""
    names = [
        "source",
        "format",
        "pattern",
        "tokenizer",
        "eval_fraction",
        "deduplicate",
        "dataset_config",
        "dataset_split",
        "encoding",
    ]
    of_format = {
        "chat": ["messages_key", "chat_template", "chat_turns", "seq_len"],
        "labelled": ["text_key", "label_key", "labels", "seq_len"],
        "labelled_words": ["text_key", "label_key", "labels", "seq_len"],
        "answers": ["seq_len"],
    }
    of_text = ["text_key", *(["sentences", "seq_len"] if data.sentences else ["append_eos", "sentences"])]
    names += of_format.get(data.format, of_text)
    names += ["vocab_size", "encoder_tokens"] if data.tokenizer == "train" else []
    return {name: getattr(data, name) for name in names}


def is_prepared(path: Path, *, data: DataConfig, settings: dict[str, Any]) -> bool:
    """Whether the folder is complete.

    Raises UserError if it was prepared with other settings or from other files.
    """
    if not (path / "corpus.json").exists():
        return False
    record = read_json(path / "corpus.json", field="data.path")
    if not folder.is_ours(record):
        problem, instead = "its corpus.json was not written by prepare", "another data.path"
        raise refusal("data.path", path, problem, allowed="an empty or prepared folder", instead=instead)
    recorded = record["settings"]
    if record.get("format") == 1:  # the default of data.pattern was another, and stdlib ignored it
        recorded = {name: value for name, value in recorded.items() if name != "pattern"}
    defaults = DataConfig()
    for name in settings | recorded:  # options that are newer than the folder had their default
        now, then = (some.get(name, getattr(defaults, name, None)) for some in (settings, recorded))
        if now != then:
            raise refusal(
                f"data.{name}",
                now,
                f"{path} was prepared with {then}",
                allowed="the settings it was prepared with",
                instead="another data.path, or prepare.overwrite=true",
            )
    notes = _check_sources(path, data=data, before=record.get("sources")) + _check_files(
        path, tokenizer_files=record.get("tokenizer_files")
    )
    say(f"{path} is prepared already{notes} (prepare.overwrite=true writes it again)")
    return True


def _check_files(path: Path, *, tokenizer_files: Any) -> str:
    """Raise UserError for a folder that training would refuse; returns a note if the tokenizer was
    changed, which is allowed.
    """
    try:
        Corpus.open(path)
    except UserError as error:
        problem = str(error).partition("\n")[0].partition("=")[2].removeprefix(f"{path}: ")
        instead = "prepare.overwrite=true, which writes it again"
        raise refusal(
            "data.path", path, problem, allowed="an unchanged folder of prepare", instead=instead
        ) from error
    changed = changed_files(path, written=tokenizer_files)
    return f"; {', '.join(changed)}" if changed else ""


def _check_sources(path: Path, *, data: DataConfig, before: Any) -> str:
    """Raise UserError if the folder was prepared from other files; returns a note if they
    cannot be compared."""
    if not isinstance(before, dict):  # earlier versions did not record it
        return ""
    try:
        listing = sources.listing(data)
    except UserError:
        return "; its source is missing, or cannot be read"
    if changes := listing.changes(before):
        instead = "prepare.overwrite=true to prepare it again, or another data.path"
        raise refusal(
            "data.source",
            data.source,
            f"{changes} since {path} was prepared",
            allowed="the files it was prepared from",
            instead=instead,
        )
    return ""
