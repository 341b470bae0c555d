"""The weight files of a Hugging Face folder, and by their headers the names, shapes and dtypes in them.

    model.safetensors if it exists, else the shards in model.safetensors.index.json,
    as transformers reads them

Torch is needed only to compare a stored head with the embedding to which config.json ties it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridtrain.config.schema import ModelConfig
from hybridtrain.errors import UserError, refusal
from hybridtrain.models import plain
from hybridtrain.runtime import log
from hybridtrain.runtime.files import is_lfs_pointer, lfs_pointer, read_object
from hybridtrain.types import ModelFacts

FIELD = "model.from_pretrained"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_OF_BUFFERS = ("I64", "BOOL")
"""Dtypes of tables of numbers, such as the experts of each token, and of no quantized weight."""
_SAMPLE = 4096  # bytes at either end of a tensor
_ROWS = 4096  # rows of two matrices that are compared at a time

_log = log.get("model")


@dataclass(frozen=True)
class Stored:
    """One tensor of a weight file."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    """In safetensors' notation: F32, BF16, I8 ..."""


def has_weights(folder: Path) -> bool:
    """Whether `folder` has safetensors weights."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def stored(folder: Path) -> dict[str, Stored]:
    """Parameter name -> where it is stored, in the files that transformers reads.

    Raises UserError if they cannot be read.
    """
    return {
        name: tensor
        for file in _files(folder)
        for name, tensor in _header(file, file.stat().st_mtime_ns).items()
    }


def _files(folder: Path) -> list[Path]:
    """The single file, else the shards of the index: the same files that transformers reads in `evaluate`."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        raise refusal(
            FIELD,
            folder,
            "there are no safetensors weights in it",
            allowed=f"{SINGLE}, or shards with their index",
            instead="convert the checkpoint with transformers' save_pretrained",
        )
    where = read_object(index, field=FIELD).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise _damaged(index, "it has no weight_map from names to files")
    if any(".lora_" in name for name in where):
        raise adapter_refused(str(folder))
    for name, file in where.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise _damaged(index, f"{name} lies in {file!r}, which is no file name in this folder")
    files = [folder / name for name in sorted(set(where.values()))]
    tensors: dict[str, Path] = {}
    for file in files:
        for name in _header(file, file.stat().st_mtime_ns if file.is_file() else 0):
            if name in tensors:
                raise _damaged(index, f"{name} is in {tensors[name].name} and in {file.name}")
            tensors[name] = file
    missing = next((name for name, file in where.items() if tensors.get(name) != folder / file), None)
    if missing is not None:
        raise _damaged(index, f"{missing} is not in {where[missing]}")
    return files


@functools.lru_cache(maxsize=512)
# `modified` is a part of the key
def _header(file: Path, modified: int) -> Mapping[str, Stored]:  # noqa: ARG001
    """The tensors in a safetensors file, without their values."""
    from safetensors import SafetensorError, safe_open

    if is_lfs_pointer(file):
        raise lfs_pointer(FIELD, file)
    try:
        with safe_open(file, framework="np") as opened:
            # safe_open is no mapping
            views = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: Stored(file, name, tuple(view.get_shape()), view.get_dtype())
                for name, view in views.items()
            }
    except (SafetensorError, OSError) as error:
        raise unreadable(file, error) from error


def digest(folder: Path) -> str:
    """A hash of the weights in a folder, however they are spread over files: of names, shapes, dtypes, and
    the first and last bytes of each. Reads little. Raises UserError.
    """
    tensors, result = stored(folder), hashlib.sha256()
    places = {file: _places(file) for file in {tensor.file for tensor in tensors.values()}}
    for name, tensor in sorted(tensors.items()):
        start, stop = places[tensor.file][name]
        result.update(f"{name} {tensor.shape} {tensor.dtype} ".encode())
        try:
            with tensor.file.open("rb") as stream:
                for begin in (start, max(start, stop - _SAMPLE)):
                    stream.seek(begin)
                    result.update(stream.read(min(_SAMPLE, stop - begin)))
        except OSError as error:
            raise unreadable(tensor.file, error) from error
    return result.hexdigest()[:16]


def stored_bytes(folder: Path) -> int:
    """Of all tensors in the files that transformers reads. Raises UserError if they cannot be read."""
    return sum(last - first for file in _files(folder) for first, last in _places(file).values())


def _places(file: Path) -> dict[str, tuple[int, int]]:
    """Name -> (first byte, byte after the last) of the tensors in a safetensors file, whose header comes
    after its own length.
    """
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
    except (OSError, ValueError) as error:
        raise unreadable(file, error) from error
    header.pop("__metadata__", None)
    return {
        name: (8 + size + first, 8 + size + last)
        for name, (first, last) in ((name, entry["data_offsets"]) for name, entry in header.items())
    }


def unreadable(file: Path, error: Exception) -> UserError:
    """The refusal of a weight file that is missing, truncated or no safetensors file."""
    return refusal(
        FIELD,
        file,
        f"it cannot be read ({error})",
        allowed="whole safetensors files",
        instead="download or export it again",
    )


def adapter_refused(folder: str) -> UserError:
    """The refusal of a LoRA adapter instead of a model."""
    return refusal(
        "model.from_pretrained",
        folder,
        "it holds a LoRA adapter, not a model",
        allowed="the whole weights of a model",
        instead="its base model with adapters=lora; or what hybridtrain export RUN export.merge=true writes, "
        "or peft's merge_and_unload",
    )


def _damaged(file: Path, problem: str) -> UserError:
    return refusal(
        FIELD,
        file,
        problem,
        allowed="an index as save_pretrained writes it",
        instead="download or export it again",
    )


def checked_tie(fields: dict[str, Any], *, model: ModelConfig) -> dict[str, Any]:
    """config.json `fields`, with tie_word_embeddings=false if the folder stores a head that
    differs from its embedding.

    transformers does the same: tying would lose the head. Only local folders are checked here (see load.py
    for hub ids). Raises UserError if the user asks for tying.
    """
    folder = Path(model.from_pretrained)
    if not (
        model.from_pretrained
        and fields.get("tie_word_embeddings")
        and folder.is_dir()
        and has_weights(folder)
    ):
        return fields
    tensors = stored(folder)
    if not heads_differ(tensors, embed=f"{plain.EMBED}.weight", head=f"{plain.HEAD}.weight"):
        return fields
    if model.config.get("tie_word_embeddings"):
        raise tie_refused(model.from_pretrained)
    _warn_untied(str(folder))
    return {**fields, "tie_word_embeddings": False}


def tie_refused(source: str) -> UserError:
    """The refusal of tying that would lose a stored head."""
    return refusal(
        "model.config.tie_word_embeddings",
        True,
        f"{source} stores a head that differs from its embedding: tying the two would lose it",
        allowed="false",
        instead="model.config.tie_word_embeddings=false",
    )


@functools.cache
def _warn_untied(folder: str) -> None:
    _log.warning(
        (
            "%s: config.json ties the head to the embedding, "
            "but the two are stored with different values: they are not tied"
        ),
        folder,
    )


def heads_differ(tensors: Mapping[str, object], *, embed: str, head: str) -> bool:
    """Whether both matrices are stored and differ."""
    first, second = tensors.get(embed), tensors.get(head)
    if not (isinstance(first, Stored) and isinstance(second, Stored)):
        return False
    return first.shape != second.shape or _differ(
        first, first.file.stat().st_mtime_ns, second, second.file.stat().st_mtime_ns
    )


@functools.lru_cache(maxsize=8)
def _differ(first: Stored, _first_time: int, second: Stored, _second_time: int) -> bool:
    import torch
    from safetensors import safe_open

    with safe_open(first.file, framework="pt") as one, safe_open(second.file, framework="pt") as other:
        left, right = one.get_slice(first.name), other.get_slice(second.name)
        blocks = (slice(start, start + _ROWS) for start in range(0, first.shape[0], _ROWS))
        return any(not torch.equal(left[rows].float(), right[rows].float()) for rows in blocks)


def check(model: ModelConfig, *, facts: ModelFacts) -> None:
    """Refuse, by their headers, weights of a local folder that cannot be the model's (raises UserError).

    A folder without weights passes: a run that resumes from its own checkpoint does not read them.
    """
    folder = Path(model.from_pretrained)
    if model.from_pretrained and folder.is_dir() and has_weights(folder):
        tensors = stored(folder)
        check_dtypes(tensors, source=model.from_pretrained)
        if facts.model_type not in plain.TYPES:
            return
        head = [] if facts.labels else [f"{plain.HEAD}.weight"]
        for name in (f"{plain.EMBED}.weight", *head):
            if name in tensors and tensors[name].shape[:1] != (facts.vocab,):
                check_rows(tensors[name].shape, rows=facts.vocab, model=model)


def check_dtypes(tensors: Mapping[str, Stored], *, source: str) -> None:
    """Refuse small integers and 8-bit floats: quantized weights need their scales (raises UserError)."""
    other = next(
        (
            name
            for name, tensor in tensors.items()
            if tensor.dtype not in (*_FLOATS, *_OF_BUFFERS) and not is_rotary_table(name)
        ),
        None,
    )
    if other is not None:
        raise refusal(
            FIELD,
            source,
            f"'{other}' is stored as {tensors[other].dtype}: quantized weights without a quantization_config",
            allowed=", ".join(_FLOATS),
            instead="the unquantized weights of this model",
        )


def check_rows(shape: tuple[int, ...], *, rows: int, model: ModelConfig) -> None:
    """Refuse a vocabulary size other than the checkpoint's, unless model.config.vocab_size is a
    larger one (raises UserError).
    """
    if shape and rows > shape[0] and "vocab_size" in model.config:
        return
    have = shape[0] if shape else 0
    raise refusal(
        "model.config.vocab_size" if "vocab_size" in model.config else FIELD,
        rows if "vocab_size" in model.config else model.from_pretrained,
        f"its embedding has {have} rows, "
        + ("and tokens cannot be removed" if rows < have else f"its config.json says vocab_size {rows}"),
        allowed=f"{have}, or more: the rows of added tokens are drawn as in a new model",
        instead=f"model.config.vocab_size={max(rows, have)}",
    )


def is_rotary_table(name: str) -> bool:
    """Whether a stored tensor is a rotary table, which older versions of transformers stored
    and newer ones compute.
    """
    return name.endswith("rotary_emb.inv_freq")
