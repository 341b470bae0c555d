"""The weights of a checkpoint, cast and written as safetensors files, one tensor in memory at a time."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from hybridtrain.checkpoint import metadata
from hybridtrain.errors import refusal
from hybridtrain.export import safetensors
from hybridtrain.export.safetensors import Entry
from hybridtrain.models import classifier

PREFIX = "model."
_HEAD = "lm_head.weight"
_SAY_EVERY_S = 5.0

log = logging.getLogger(__name__)


def write(checkpoint: Path, *, partial: Path, config: dict[str, Any], stored: metadata.dcp_metadata.Metadata, dtype: torch.dtype, max_shard_bytes: int) -> None:
    """Write the safetensors files and, if there are several, their index."""
    tied = bool(config.get("tie_word_embeddings", False))
    head = f"{classifier.HEAD}.weight" if classifier.is_classifier(config.get("architectures")) else _HEAD
    entries = _entries(stored, dtype=dtype, tied=tied)
    if not entries or not (tied or any(entry.name == head for entry in entries)):
        raise refusal(
            "checkpoint",
            checkpoint,
            f"it has no {head if entries else 'model weights'}, and the model's config.json does not tie the embeddings",
            allowed="a checkpoint of the model in config.json",
            instead="a checkpoint of the same run",
        )
    say = _progress_line(tensors=len(entries), size=sum(entry.size for entry in entries))

    def tensor(entry: Entry) -> torch.Tensor:
        key = PREFIX + entry.name
        whole = {key: torch.empty(entry.shape, dtype=stored.state_dict_metadata[key].properties.dtype)}  # type: ignore[union-attr]
        metadata.load_into(whole, path=checkpoint, metadata=stored, group=None)
        say(entry)
        return _cast(whole[key], entry=entry)

    named = {entry.name: entry for entry in entries}
    cut = split_state_dict_into_shards_factory(
        named, get_storage_size=lambda entry: entry.size, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_bytes
    )
    for file, names in cut.filename_to_tensors.items():
        safetensors.write(partial / file, entries=[named[name] for name in names], tensor=tensor)
    if cut.is_sharded:
        index = {"metadata": cut.metadata, "weight_map": cut.tensor_to_filename}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _entries(stored: metadata.dcp_metadata.Metadata, *, dtype: torch.dtype, tied: bool) -> list[Entry]:
    """The weights to export, in the order of the layers. A tied head is not stored twice (the Hugging Face convention)."""
    entries = []
    for key, entry in stored.state_dict_metadata.items():
        assert isinstance(entry, metadata.dcp_metadata.TensorStorageMetadata)  # metadata.read has refused everything else
        name = key.removeprefix(PREFIX)
        if key.startswith(PREFIX) and not (tied and name == _HEAD):
            was = entry.properties.dtype
            entries.append(Entry(name, tuple(entry.size), dtype if was.is_floating_point else was))
    return sorted(entries, key=lambda entry: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", entry.name)])


def _cast(tensor: torch.Tensor, *, entry: Entry) -> torch.Tensor:
    """Cast, but never turn a number into infinity."""
    cast = tensor.to(entry.dtype)
    if tensor.is_floating_point() and bool((cast.isinf() & ~tensor.isinf()).any()):
        largest = float(tensor.abs().max())
        dtype = str(entry.dtype).removeprefix("torch.")
        raise refusal("export.dtype", dtype, f"{entry.name} has values up to {largest:.3g}", allowed="bfloat16 or float32", instead="export.dtype=bfloat16")
    return cast


def _progress_line(*, tensors: int, size: int) -> Callable[[Entry], None]:
    """A line that says how far the export is: rewritten in place on a terminal, else a new one every few seconds."""
    done, written, said = 0, 0, time.monotonic()

    def say(entry: Entry) -> None:
        nonlocal done, written, said
        done, written = done + 1, written + entry.size
        if time.monotonic() - said < _SAY_EVERY_S and not (sys.stderr.isatty() and done == tensors):
            return
        said = time.monotonic()
        line = f"export: {done}/{tensors} tensors, {written / 1e9:.2f}/{size / 1e9:.2f} GB"
        if sys.stderr.isatty():
            print("\r" + line, end="\n" if done == tensors else "", file=sys.stderr, flush=True)
        else:
            log.info(line)

    return say
