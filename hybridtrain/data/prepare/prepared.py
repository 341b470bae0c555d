"""Whether a folder is prepared already: with the same settings, from the same files, and whole."""

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
    """What determines the token files, apart from the text itself."""
    names = ["source", "format", "pattern", "tokenizer", "eval_fraction", "deduplicate", "dataset_config", "dataset_split", "encoding"]
    own = {"chat": ["messages_key", "chat_template", "chat_turns", "seq_len"], "labelled": ["text_key", "label_key", "labels", "seq_len"]}
    names += own.get(data.format, ["text_key", "append_eos"])
    names += ["vocab_size"] if data.tokenizer == "train" else []
    return {name: getattr(data, name) for name in names}


def is_prepared(path: Path, *, data: DataConfig, settings: dict[str, Any]) -> bool:
    """Whether the folder is complete with these settings and from these files; raises UserError when it is complete with others."""
    if not (path / "corpus.json").exists():
        return False
    record = read_json(path / "corpus.json", field="data.path")
    if not folder.is_ours(record):
        words, instead = "its corpus.json is not one that prepare wrote", "another data.path"
        raise refusal("data.path", path, words, allowed="an empty or prepared folder", instead=instead)
    found = record["settings"]
    if record.get("format") == 1:
        found = {name: value for name, value in found.items() if name != "pattern"}  # another default, and never read for stdlib
    defaults = DataConfig()
    for name in settings | found:  # an option that the folder does not know had its default
        wanted, had = (some.get(name, getattr(defaults, name, None)) for some in (settings, found))
        if wanted != had:
            raise refusal(
                f"data.{name}",
                wanted,
                f"{path} was prepared with {had}",
                allowed="the settings it was prepared with",
                instead="another data.path, or prepare.overwrite=true",
            )
    gone = _compare(path, data=data, before=record.get("sources"))
    changed = _check_files(path, tokenizer_files=record.get("tokenizer_files"))
    say(f"{path} is prepared already{gone}{changed} (prepare.overwrite=true writes it again)")
    return True


def _check_files(path: Path, *, tokenizer_files: Any) -> str:
    """Refuse a folder that training would refuse (raises UserError); a note on a tokenizer that has changed since, which may be meant."""
    try:
        Corpus.open(path)
    except UserError as error:
        words = str(error).partition("\n")[0].partition("=")[2].removeprefix(f"{path}: ")
        raise refusal("data.path", path, words, allowed="a folder as prepare left it", instead="prepare.overwrite=true, which writes it again") from error
    changed = changed_files(path, written=tokenizer_files)
    return f"; {', '.join(changed)}" if changed else ""


def _compare(path: Path, *, data: DataConfig, before: Any) -> str:
    """Refuse what was prepared from other files (raises UserError); a note where the files cannot be compared."""
    if not isinstance(before, dict):  # an earlier version kept none of it
        return ""
    try:
        listing = sources.listing(data)
    except UserError:
        return "; its source is not there any more, or cannot be read"
    if changes := listing.changes(before):
        instead = "prepare.overwrite=true to prepare it again, or another data.path"
        raise refusal("data.source", data.source, f"{changes} since {path} was prepared", allowed="the files it was prepared from", instead=instead)
    return ""
