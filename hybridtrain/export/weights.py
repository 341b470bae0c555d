"""Casts a checkpoint's weights and writes them as safetensors files, with one tensor in memory at a time."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from hybridtrain.checkpoint import metadata
from hybridtrain.errors import refusal
from hybridtrain.export import safetensors
from hybridtrain.export.safetensors import TensorSpec
from hybridtrain.models import build, classifier, conversion
from hybridtrain.models.plain import TYPES
from hybridtrain.optim.average import PREFIX as AVERAGE
from hybridtrain.optim.stored import COMPENSATION
from hybridtrain.precision.rounding import joined

PREFIX = "model."
_HEAD = "lm_head.weight"
_PROGRESS_EVERY_S = 5.0

log = logging.getLogger(__name__)


def write(
    checkpoint: Path,
    *,
    partial: Path,
    config: dict[str, Any],
    stored: metadata.dcp_metadata.Metadata,
    dtype: torch.dtype,
    average: bool,
    max_shard_bytes: int,
) -> None:
    """Write the safetensors files to `partial` and, if there are several, their index. Raises UserError.

    `average`: those of optim.ema, where there is one; what is not trained has none.
    """
    tied = bool(config.get("tie_word_embeddings", False))
    head = f"{classifier.HEAD}.weight" if classifier.is_classifier(config.get("architectures")) else _HEAD
    known = config.get("model_type") in TYPES
    model = None if known else build.meta_model(build.hf_config(config, chosen={}, attention="sdpa"))
    kept = set(build.saved_buffers(model)) if model is not None else set()
    specs = _specs(stored, dtype=dtype, tied=tied, kept=kept)
    if not specs or (known and not (tied or any(spec.name == head for spec in specs))):
        raise refusal(
            "checkpoint",
            checkpoint,
            (
                f"it has no {head if specs else 'model weights'}, "
                "and the model's config.json does not tie the embeddings"
            ),
            allowed="a checkpoint of the model in config.json",
            instead="a checkpoint of the same run",
        )

    read = reader(checkpoint, stored, average=average)
    write_files(specs, read, model=model, partial=partial, max_shard_bytes=max_shard_bytes)


def write_files(
    specs: list[TensorSpec],
    read: Callable[[TensorSpec], torch.Tensor],
    *,
    model: torch.nn.Module | None,
    partial: Path,
    max_shard_bytes: int,
) -> None:
    """Write parameters as safetensors files and, if there are several, their index. `model`: on meta, if its
    parameters are stored under other names.
    """
    values = read
    if model is not None:
        specs, values = _converted(specs, read, model=model)
    report = _progress_line(tensors=len(specs), size=sum(spec.size for spec in specs))

    def tensor(spec: TensorSpec) -> torch.Tensor:
        report(spec)
        return values(spec)

    by_name = {spec.name: spec for spec in specs}
    shards = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda spec: spec.size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, names in shards.filename_to_tensors.items():
        safetensors.write(partial / file, specs=[by_name[name] for name in names], tensor=tensor, metadata={})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def reader(
    checkpoint: Path, stored: metadata.dcp_metadata.Metadata, *, average: bool
) -> Callable[[TensorSpec], torch.Tensor]:
    """What reads a weight of a checkpoint, and casts it."""

    def loaded(key: str, spec: TensorSpec) -> torch.Tensor:
        dtype = stored.state_dict_metadata[key].properties.dtype  # type: ignore[union-attr]
        full = {key: torch.empty(spec.shape, dtype=dtype)}
        metadata.load_into(full, path=checkpoint, metadata=stored, group=None)
        return full[key]

    def read(spec: TensorSpec) -> torch.Tensor:
        if average and AVERAGE + spec.name in stored.state_dict_metadata:
            return cast(loaded(AVERAGE + spec.name, spec), spec=spec)
        weight, rest = loaded(PREFIX + spec.name, spec), f"optim.{spec.name}.{COMPENSATION}"
        if spec.dtype != weight.dtype and rest in stored.state_dict_metadata:  # what bf16 lacks
            weight = joined(weight, loaded(rest, spec))
        return cast(weight, spec=spec)

    return read


def _converted(
    specs: list[TensorSpec], read: Callable[[TensorSpec], torch.Tensor], *, model: torch.nn.Module
) -> tuple[list[TensorSpec], Callable[[TensorSpec], torch.Tensor]]:
    """The weights as transformers stores them, and what reads one; a layer at a time is in memory."""
    units: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        layer = re.search(r"\.\d+\.", spec.name)
        units.setdefault(spec.name[: layer.end()] if layer else "", []).append(spec)
    unit_of: dict[str, str] = {}
    result: list[TensorSpec] = []
    for unit, members in units.items():
        empty = {each.name: torch.empty(each.shape, dtype=each.dtype, device="meta") for each in members}
        for name, tensor in conversion.as_stored(model, empty).items():
            unit_of[name] = unit
            result.append(TensorSpec(name, tuple(tensor.shape), tensor.dtype))
    last: dict[str, dict[str, torch.Tensor]] = {}

    def converted(spec: TensorSpec) -> torch.Tensor:
        unit = unit_of[spec.name]
        if unit not in last:
            last.clear()
            last[unit] = conversion.as_stored(model, {each.name: read(each) for each in units[unit]})
        return last[unit][spec.name].contiguous()

    return result, converted


def _specs(
    stored: metadata.dcp_metadata.Metadata, *, dtype: torch.dtype, tied: bool, kept: Collection[str]
) -> list[TensorSpec]:
    """The weights to export, in layer order. A tied head is left out, as is the Hugging Face convention.

    `kept`: those that are not cast. transformers computes with them in fp32.
    """
    specs = []
    for key, entry in stored.state_dict_metadata.items():
        assert isinstance(entry, metadata.dcp_metadata.TensorStorageMetadata)  # see metadata.read
        name = key.removeprefix(PREFIX)
        if key.startswith(PREFIX) and not (tied and name == _HEAD):
            was = entry.properties.dtype
            casts = was.is_floating_point and name not in kept
            specs.append(TensorSpec(name, tuple(entry.size), dtype if casts else was))
    return in_order(specs)


def in_order(specs: list[TensorSpec]) -> list[TensorSpec]:
    """Sorted by layer."""
    return sorted(
        specs,
        key=lambda spec: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", spec.name)],
    )


def cast(tensor: torch.Tensor, *, spec: TensorSpec) -> torch.Tensor:
    """Cast to the dtype of `spec`. Raises UserError if a finite value would become infinite."""
    result = tensor.to(spec.dtype)
    if tensor.is_floating_point() and bool((result.isinf() & ~tensor.isinf()).any()):
        largest = float(tensor.abs().max())
        dtype = str(spec.dtype).removeprefix("torch.")
        raise refusal(
            "export.dtype",
            dtype,
            f"{spec.name} has values up to {largest:.3g}",
            allowed="bfloat16 or float32",
            instead="export.dtype=bfloat16",
        )
    return result


def _progress_line(*, tensors: int, size: int) -> Callable[[TensorSpec], None]:
    """Returns what prints the progress after each tensor: one updated line on a terminal, else a new
    line every few seconds.
    """
    done, written, last = 0, 0, time.monotonic()

    def report(spec: TensorSpec) -> None:
        nonlocal done, written, last
        done, written = done + 1, written + spec.size
        if time.monotonic() - last < _PROGRESS_EVERY_S and not (sys.stderr.isatty() and done == tensors):
            return
        last = time.monotonic()
        line = f"export: {done}/{tensors} tensors, {written / 1e9:.2f}/{size / 1e9:.2f} GB"
        if sys.stderr.isatty():
            print("\r" + line, end="\n" if done == tensors else "", file=sys.stderr, flush=True)
        else:
            log.info(line)

    return report
