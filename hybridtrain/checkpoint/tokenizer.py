"""The tokenizer of a run's data: copied into the run at its start, into each checkpoint, and from
there into an export.

data.path/tokenizer  --start-->  <run>/model/tokenizer  --save-->  <checkpoint>/tokenizer  -->  export

The data may be moved or changed in the meantime. Version 0.1 copied nothing: then the tokenizer of the data
is used, if the data are still those of the run.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from hybridtrain.checkpoint import marker
from hybridtrain.config.schema import Config, DataConfig
from hybridtrain.data import vocabulary
from hybridtrain.data.blend import current_fingerprint, tokenizer_dir
from hybridtrain.data.corpus import changed_files
from hybridtrain.errors import UserError, refusal
from hybridtrain.models import tokens
from hybridtrain.runtime import log
from hybridtrain.runtime.files import discard, is_lfs_pointer, read_object, write_atomically, write_json

_log = log.get("tokenizer")


@dataclass(frozen=True)
class CheckpointTokenizer:
    """The tokenizer of a checkpoint."""

    folder: Path
    conversations: bool
    """Whether the run was trained on conversations, in the chat template of this tokenizer."""


def current(config: Config) -> Path | None:
    """The folder of the tokenizer that `config` leads to now: that of the data,
    else that of model.from_pretrained.
    """
    pretrained = Path(config.model.from_pretrained)
    own = (
        pretrained
        if config.model.from_pretrained
        and any((pretrained / name).is_file() for name in tokens.TOKENIZER_FILES)
        else None
    )
    return tokenizer_dir(config.data) or own


def keep(config: Config, *, run: Path, fingerprint: str) -> None:
    """Copy the tokenizer into the run, unless it has that of this data already. On rank 0, at the start.

    Raises OSError.
    """
    source, folder = current(config), run / "model" / marker.TOKENIZER
    before = _record(folder)
    if before.get("fingerprint") == fingerprint:
        return
    if source is None:
        if before:
            _log.warning(
                "the data have no tokenizer; the run keeps that of %s, which it began with",
                before.get("path"),
            )
        return
    if problem := _problem(source):
        _log.warning(
            "the tokenizer is not copied into the run, an export will look for it again: %s", problem
        )
        discard(folder / marker.DATA)
        return
    discard(folder)
    folder.mkdir(parents=True)
    for name in tokens.files_of(source):
        (folder / name).parent.mkdir(exist_ok=True)
        write_atomically(folder / name, (source / name).read_bytes())
    path = ", ".join(config.data.blend) or config.data.path
    write_json(
        folder / marker.DATA,
        {"path": path, "fingerprint": fingerprint, "conversations": _conversations(config.data)},
    )


def _record(folder: Path) -> dict[str, object]:
    """Content of DATA in a copied tokenizer's folder; empty if there is none."""
    try:
        return read_object(folder / marker.DATA, field="run.dir")
    except UserError:
        return {}


def _problem(source: Path) -> str:
    """What is wrong with a tokenizer's files, e.g. changed since `prepare` wrote them; "" if nothing."""
    pointer = next((name for name in tokens.files_of(source) if is_lfs_pointer(source / name)), None)
    return f"{source / pointer} is a git-lfs pointer" if pointer else "; ".join(changed(source))


def changed(folder: Path) -> list[str]:
    """Messages about files of a corpus's tokenizer that have changed since the corpus was prepared."""
    corpus = folder.parent
    try:
        record = (
            read_object(corpus / "corpus.json", field="data.path")
            if (corpus / "corpus.json").is_file()
            else {}
        )
        return [f"{corpus}: {line}" for line in changed_files(corpus, written=record.get("tokenizer_files"))]
    except (UserError, OSError):
        return []


def _conversations(data: DataConfig) -> bool:
    try:
        return any(facts.get("kind") == "chat" for facts in vocabulary.records(data))
    except UserError as error:  # an export does not need the data
        _log.warning(
            "whether the run was trained on conversations is not known: %s", str(error).partition("\n")[0]
        )
        return False


def of_checkpoint(checkpoint: Path, *, run: Path, config: Config) -> CheckpointTokenizer | None:
    """The tokenizer that a complete checkpoint of `run` was trained with; None if there is none.

    `config`: config.yaml of the run. Raises UserError if it would have to be taken from the data, and
    the data have changed.
    """
    folder_of_checkpoint = checkpoint / marker.TOKENIZER
    if (folder_of_checkpoint / marker.DATA).is_file():
        return CheckpointTokenizer(
            folder_of_checkpoint,
            bool(read_object(folder_of_checkpoint / marker.DATA, field="checkpoint").get("conversations")),
        )
    written = marker.read_progress(checkpoint).fingerprints.get("data")
    others = []
    for data in _places(config, run=run):
        folder = tokenizer_dir(dataclasses.replace(data, tokenizer="train"))
        if folder is not None and written in (None, now := current_fingerprint(data)):
            return CheckpointTokenizer(folder, _conversations(data))
        others += [(folder, now)] if folder is not None else []
    if others:
        folder, now = others[0]
        raise refusal(
            "data.path",
            folder.parent,
            (
                f"{checkpoint.name} was trained on other data ({written}) "
                f"than are there now ({now or 'unknown'}), so this is not its tokenizer"
            ),
            allowed="the corpus that the run was trained on, or none",
            instead=(
                "prepare the same text there again, or hybridtrain export where "
                f"{folder.parent} is the run's corpus; without a tokenizer: move it away"
            ),
        )
    loose = current(config)
    return (
        CheckpointTokenizer(
            loose, written in (None, current_fingerprint(config.data)) and _conversations(config.data)
        )
        if loose is not None
        else None
    )


def _places(config: Config, *, run: Path) -> list[DataConfig]:
    """The run's data config; if its paths are relative, also with paths from the folder in which
    the run was started.
    """
    own, place = Path(config.run.dir or Path("runs") / config.run.name).parent, run.resolve().parent
    if own.is_absolute() or place.parts[len(place.parts) - len(own.parts) :] != own.parts:
        return [config.data]
    began = Path(*place.parts[: len(place.parts) - len(own.parts)])
    path, blend = (
        str(began / config.data.path) if config.data.path else "",
        {str(began / path): weight for path, weight in config.data.blend.items()},
    )
    return [config.data, dataclasses.replace(config.data, path=path, blend=blend)]
