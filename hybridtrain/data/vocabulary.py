"""The tokenizer of prepared data, by its files alone: what ends a text, and an answer of a conversation; whether a model's is another."""

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
    """corpus.json of data.path or of each corpus of data.blend, where it is there. Raises UserError for one that cannot be read."""
    files = [Path(path) / "corpus.json" for path in data.blend or [data.path] if path]
    return [read_object(file, field="data.path") for file in files if file.is_file()]


def end_tokens(facts: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Of a corpus.json: ids of the tokens that end a text and an answer of a conversation; None where there is none, or it is not known."""
    template = facts.get("template")
    turn = template.get("end_of_turn_id") if isinstance(template, dict) else None
    return facts.get("eos_id"), turn if type(turn) is int else None


def compare(model: Path, data: Path | None) -> None:
    """Warn where the tokenizer in a model's folder is another than the one of the data in `data`; nothing is said where one of them is not known.

    By what they make of a text: files that were saved again, or have another chat template, are the same.
    """
    try:
        one, other = _tokens(model), None if data is None else _tokens(data)
    except (UserError, AttributeError, KeyError, TypeError, ValueError) as error:
        _log.warning("it is not known whether model and data have the same tokenizer: %s", str(error).partition("\n")[0])
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
        _log.warning("the model's tokenizer (%s) and that of the data (%s) are not the same: %s, so that the model reads another text", model, data, words)


def _tokens(folder: Path) -> tuple[dict[int, str], set[tuple[int, str]]] | None:
    """{id: token}, and the merges with their rank; None where the files of the folder do not tell."""
    if (folder / "tokenizer.json").is_file():
        content = read_object(folder / "tokenizer.json", field="data.tokenizer")
        vocab, merges = content["model"]["vocab"], content["model"].get("merges") or []
        tokens = {number: token for token, number in vocab.items()} if isinstance(vocab, Mapping) else {number: entry[0] for number, entry in enumerate(vocab)}
        tokens |= {token["id"]: token["content"] for token in content.get("added_tokens") or []}
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        tokens = {number: token for token, number in read_object(folder / "vocab.json", field="data.tokenizer").items()}
        merges = [line for line in (folder / "merges.txt").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#version")]
    else:
        return None
    return tokens, {(rank, merge if isinstance(merge, str) else " ".join(merge)) for rank, merge in enumerate(merges)}
