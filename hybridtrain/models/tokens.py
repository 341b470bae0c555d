"""What an export needs besides weights: tokenizer files, the tokens that begin and end
a text, sampling values.

source's generation_config.json  --unchanged-->  <run>/model/  --+ end tokens of the corpus-->  export
new weights                      --begin and end tokens of the corpus's tokenizer----------->  export
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridtrain.config.schema import ModelConfig
from hybridtrain.errors import refusal
from hybridtrain.models import classifier, hub
from hybridtrain.runtime import network
from hybridtrain.runtime.files import is_lfs_pointer, lfs_pointer, read_object

GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATES = "additional_chat_templates"
"""Folder of named chat templates, beside these files."""
_DERIVED = "_from_model_config"  # transformers' mark of a file that it made from config.json alone


@dataclass(frozen=True)
class Ends:
    """Ids of a tokenizer's special tokens; None: it has no such token."""

    begin: int | None
    end: int | None
    pad: int | None
    turn: int | None
    """End of an answer in the chat template, for runs on conversations."""


def load_tokenizer(source: str, *, field: str, trust_remote_code: bool) -> Any:
    """The tokenizer of a folder or hub id. Raises UserError, with `field`, if transformers cannot load it."""
    from transformers import AutoTokenizer

    pointer = next(
        (Path(source) / name for name in TOKENIZER_FILES if is_lfs_pointer(Path(source) / name)), None
    )
    if pointer is not None:
        raise lfs_pointer(field, pointer)
    try:
        local = not (Path(source).exists() or network.hub_resolves())
        return AutoTokenizer.from_pretrained(
            source, trust_remote_code=trust_remote_code, local_files_only=local
        )
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # Rust code raises bare Exceptions, and panics, which are no Exceptions
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise refusal(
            field,
            source,
            f"transformers cannot load its tokenizer: {reason[:300]}",
            allowed="a folder with the complete tokenizer files",
            instead="restore the files, or another folder",
        ) from error


def ends(tokenizer: Any, *, turn: int | None) -> Ends:
    return Ends(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, turn)


def files_of(folder: Path) -> list[str]:
    """Names of the tokenizer's files in `folder`, relative to it. The folder may also hold a model."""
    named = sorted(f"{TEMPLATES}/{path.name}" for path in (folder / TEMPLATES).glob("*") if path.is_file())
    return [name for name in TOKENIZER_FILES if (folder / name).is_file()] + named


def copy_tokenizer(folder: Path, *, out: Path) -> None:
    """Copy the tokenizer's files from `folder` to `out`. Raises OSError."""
    for name in files_of(folder):
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, out / name)


def source_generation(model: ModelConfig) -> dict[str, Any] | None:
    """generation_config.json of `model.from_pretrained`; None if there is none.

    Raises UserError if it cannot be read.
    """
    if not model.from_pretrained:
        return None
    folder = Path(model.from_pretrained)
    if folder.is_dir():
        return (
            read_object(folder / GENERATION, field="model.from_pretrained")
            if (folder / GENERATION).is_file()
            else None
        )
    file = hub.optional(model, GENERATION)
    return read_object(file, field="model.from_pretrained") if file else None


def is_derived(generation: Mapping[str, Any]) -> bool:
    """Whether transformers derived this generation config from config.json alone."""
    return bool(generation.get(_DERIVED))


def with_end_tokens(
    config: dict[str, Any], generation: dict[str, Any], *, of_tokenizer: Ends | None, new: bool
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """config.json and generation_config.json of an export, and log lines on contradictions.

    New weights get the tokens of the corpus's tokenizer. Others keep those of their source, plus the tokens
    that ended the texts and answers of training. The padding token is set only in generation_config.json,
    since in config.json it would freeze its row of the embedding; a classifier needs it there.
    """
    if of_tokenizer is None:
        return config, generation, []
    # A classifier finds the last token by the padding.
    if classifier.is_classifier(config.get("architectures")) and config.get("pad_token_id") is None:
        config = {
            **config,
            "pad_token_id": of_tokenizer.end if of_tokenizer.pad is None else of_tokenizer.pad,
        }
    trained_ends = [
        token for token in dict.fromkeys((of_tokenizer.end, of_tokenizer.turn)) if token is not None
    ]
    of_config, lines = _listed(config.get("eos_token_id")), []
    if of_tokenizer.end is not None and of_tokenizer.end not in of_config:
        lines.append(
            f"config.json ends texts with {of_config or 'no token'}, the tokenizer with {of_tokenizer.end}"
        )
    if of_tokenizer.turn is not None and of_tokenizer.turn != of_tokenizer.end:
        lines.append(
            f"the chat template ends answers with {of_tokenizer.turn}, "
            f"the tokenizer ends texts with {_listed(of_tokenizer.end) or 'no token'}"
        )
    if new:
        tokens = {"bos_token_id": of_tokenizer.begin, "eos_token_id": of_tokenizer.end}
        of_texts = {
            "bos_token_id": of_tokenizer.begin,
            "eos_token_id": trained_ends[0] if len(trained_ends) == 1 else trained_ends or None,
            "pad_token_id": of_tokenizer.pad,
        }
        return (
            {**config, **tokens},
            {**generation, **{key: value for key, value in of_texts.items() if value is not None}},
            lines,
        )
    known = end_ids(config, generation)
    more = [token for token in trained_ends if token not in known]
    if more:
        lines.append(
            f"{GENERATION}: eos_token_id {known or 'none'} and {', '.join(map(str, more))}, "
            "which ended what was trained on"
        )
        generation = {
            **generation,
            "eos_token_id": [*known, *more] if len(known) + len(more) > 1 else more[0],
        }
    return config, generation, lines


def _listed(ids: Any) -> list[int]:
    return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]


def check_ids(ids: list[int], *, rows: int, field: str) -> None:
    """Refuse token ids that the model's embedding of `rows` rows does not have (raises UserError)."""
    if ids and max(ids) >= rows:
        raise refusal(
            field,
            f"(token id {max(ids)})",
            f"the tokenizer has a token for which the model, with {rows} rows, has no embedding",
            allowed=f"texts of tokens 0 to {rows - 1}",
            instead=(
                "a text without that token, or a model trained "
                "with model.config.vocab_size of the whole tokenizer"
            ),
        )


def read_texts(file: Path, *, field: str) -> list[str]:
    """The lines of a file that are not empty. Raises UserError if there are none."""
    reason = "it is empty"
    try:
        lines = [line for line in file.read_bytes().decode("utf-8-sig").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        lines, reason = [], getattr(error, "strerror", None) or "it is not UTF-8"
    if not lines:
        allowed = "a UTF-8 file, a text on each line"
        raise refusal(field, file, reason, allowed=allowed, instead="another file")
    return lines


def end_ids(config: Mapping[str, Any], generation: Mapping[str, Any]) -> list[int]:
    """The tokens at which a text ends, from config.json and generation_config.json."""
    return _listed(generation.get("eos_token_id", config.get("eos_token_id")))


def prompt_ids(prompt: str, *, tokenizer: Any, field: str) -> list[int]:
    """The tokens of a prompt; of an empty one that which begins a text. Raises UserError if there is none."""
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids: list[int] = tokenizer(prompt)["input_ids"] or ([] if begin is None else [begin])
    if not ids:
        words = "the tokenizer makes no token of it, and has no token that begins a text"
        raise refusal(field, repr(prompt), words, allowed="a text", instead=f"{field}=TEXT")
    return ids


def continuation(ids: list[int], *, prompt: int, tokenizer: Any) -> str:
    """The text of `ids` after the first `prompt` of them.

    Both are decoded together: a tokenizer may drop the space at the beginning of a text.
    """
    before, whole = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:prompt], ids))
    return str(whole[len(before) :])
