"""The tokenizer of prepared data, by its files: its end tokens, and whether it differs from a model's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridtrain.config.schema import DataConfig
from hybridtrain.errors import UserError
from hybridtrain.runtime import log
from hybridtrain.runtime.files import read_object

_log = log.get("tokenizer")


def records(data: DataConfig) -> list[dict[str, Any]]:
    """corpus.json of data.path, or of each corpus of data.blend, if it exists.

    Raises UserError if one cannot be read.
    """
    files = [Path(path) / "corpus.json" for path in data.blend or [data.path] if path]
    return [read_object(file, field="data.path") for file in files if file.is_file()]


def end_tokens(facts: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Ids of the tokens that end a text, and an answer in a conversation, from corpus.json; None if there is
    none or it is unknown.
    """
    template = facts.get("template")
    turn = template.get("end_of_turn_id") if isinstance(template, dict) else None
    return facts.get("eos_id"), turn if type(turn) is int else None


def compare(model: Path, data: Path | None) -> None:
    """Warn if the tokenizer in the folder `model` differs from that in `data`; do nothing if one
    of them is unknown.

    Compares tokens and merges, so that tokenizers saved again, or with other chat templates, are equal.
    """
    try:
        one, other = _tokens(model), None if data is None else _tokens(data)
    except (UserError, AttributeError, KeyError, TypeError, ValueError) as error:
        _log.warning(
            "it is not known whether model and data have the same tokenizer: %s",
            str(error).partition("\n")[0],
        )
        return
    if one is None or other is None:
        return
    (ours, merges), (theirs, its_merges) = one, other
    differing = sum(ours.get(number) != theirs.get(number) for number in ours.keys() | theirs.keys())
    words = (
        f"{differing} of {len(ours.keys() | theirs.keys())} tokens differ"
        if differing
        else f"{max(len(merges - its_merges), len(its_merges - merges))} merges differ"
        if merges != its_merges
        else ""
    )
    if words:
        _log.warning(
            (
                "the model's tokenizer (%s) and that of the data (%s) are not the same: %s, "
                "so that the model reads another text"
            ),
            model,
            data,
            words,
        )


def _tokens(folder: Path) -> tuple[dict[int, str], set[tuple[int, str]]] | None:
    """({id: token}, {(rank, merge)}); None if the folder has no files of a known format."""
    if (folder / "tokenizer.json").is_file():
        content = read_object(folder / "tokenizer.json", field="data.tokenizer")
        vocab, merges = content["model"]["vocab"], content["model"].get("merges") or []
        tokens = (
            {number: token for token, number in vocab.items()}
            if isinstance(vocab, Mapping)
            else {number: entry[0] for number, entry in enumerate(vocab)}
        )
        tokens |= {token["id"]: token["content"] for token in content.get("added_tokens") or []}
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        tokens = {
            number: token
            for token, number in read_object(folder / "vocab.json", field="data.tokenizer").items()
        }
        merges = [
            line
            for line in (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
            if line and not line.startswith("#version")
        ]
    else:
        return None
    return tokens, {
        (rank, merge if isinstance(merge, str) else " ".join(merge)) for rank, merge in enumerate(merges)
    }
