"""What an interrupted `hybridtrain quantize` leaves behind, and goes on from when it is started again.

<out>.partial/progress.json              what is quantised, and how; the finished files, in their order
              states-00003.safetensors   with calibration: what goes into layer 3, of each batch of rows

The record is written after the files that it names, and before those that it no longer needs are removed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hybridtrain.checkpoint import export_record
from hybridtrain.export import safetensors
from hybridtrain.export.safetensors import TensorSpec
from hybridtrain.models import weights
from hybridtrain.quantize.plan import Plan
from hybridtrain.runtime import host, log
from hybridtrain.runtime.files import discard, write_json
from hybridtrain.types import Batch

FILE = "progress.json"
_log = log.get("quantize")


class Progress:
    """The finished files of a folder. What is there of anything else than `of` is removed.

    `of`: what the files follow from, word -> value.
    """

    def __init__(self, folder: Path, of: Mapping[str, str], *, layers: int):
        self.folder, self.of = folder, dict(of)
        self.files: list[dict[str, Any]] = []
        """What was given to `add`, the first for what is outside the layers."""
        self._states = ""
        self._read(layers)
        kept = {export_record.ORIGIN, FILE, self._states, *(each["file"] for each in self.files)}
        for path in sorted(folder.iterdir()):
            if path.name not in kept:
                discard(path)
        self._write()

    def states(self) -> list[Tensor]:
        """What goes into the layer after the finished ones; empty: none is finished, or nothing was kept."""
        if not self._states:
            return []
        with safe_open(self.folder / self._states, framework="pt") as file:
            return [file.get_tensor(name) for name in sorted(file.keys(), key=int)]

    def add(self, file: Mapping[str, Any], *, states: Sequence[Tensor]) -> None:
        """Record a finished `file` (with at least its name as `file`), and keep the states after it."""
        before, self._states = self._states, ""
        self.files.append({**file, "size": (self.folder / file["file"]).stat().st_size})
        if states:
            self._states = f"states-{len(self.files) - 1:05d}.safetensors"
            specs = [TensorSpec(str(at), tuple(each.shape), each.dtype) for at, each in enumerate(states)]
            safetensors.write(
                self.folder / self._states,
                specs=specs,
                tensor=lambda spec: states[int(spec.name)],
                metadata={},
            )
        self._write()
        if before:
            discard(self.folder / before)

    def _read(self, layers: int) -> None:
        """Take up what is there, and log it."""
        try:
            record = json.loads((self.folder / FILE).read_bytes())
            of, files, states = dict(record["of"]), list(record["files"]), str(record["states"])
            whole = all((self.folder / each["file"]).stat().st_size == each["size"] for each in files)
            whole = whole and (not states or (self.folder / states).is_file())
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            whole, of, files, states = False, self.of, [], ""
        differs = [word for word in self.of.keys() | of.keys() if self.of.get(word) != of.get(word)]
        if not whole:
            _log.warning("an interrupted start left files that are not whole: all layers are quantised anew")
        elif differs:
            words = ", ".join(sorted(differs))
            _log.warning("an interrupted start had other %s: all layers are quantised anew", words)
        elif len(files) > 1:
            _log.info("layers 0 to %d of %d are kept from an interrupted start", len(files) - 2, layers)
        if whole and not differs:
            self.files, self._states = files, states

    def _write(self) -> None:
        write_json(self.folder / FILE, {"of": self.of, "files": self.files, "states": self._states})


def of(
    folder: Path, fields: Mapping[str, Any], plan: Plan, *, dtype: torch.dtype, rows: Sequence[Batch]
) -> dict[str, str]:
    """What the files of a quantised model follow from: those of its source in `folder`, whose config.json has
    `fields`, and how it is quantised. `rows`: of calibration.
    """
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = {**host.versions(), "compressed-tensors": _version()}
    return {
        "weights": _digest([weights.digest(folder).encode(), *_times(folder)]),
        "config.json": _digest([json.dumps(fields, sort_keys=True, default=str).encode()]),
        "schemes of layers": _digest(
            [f"{path} {scheme.name}\n".encode() for path, scheme in sorted(plan.items())]
        ),
        "quantize.dtype": str(dtype).removeprefix("torch."),
        "calibration rows": _digest([part for row in rows for part in _parts(row)]),
        "device": device,
        "library versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _times(folder: Path) -> Iterator[bytes]:
    """When the files of a source were written: `digest` reads a part of each tensor."""
    for file in sorted(folder.glob("*.safetensors")):
        found = file.stat()
        yield f"{file.name} {found.st_size} {found.st_mtime_ns}\n".encode()


def _parts(row: Batch) -> Iterator[bytes]:
    """All that is in a batch."""
    for field in dataclasses.fields(row):
        value = getattr(row, field.name)
        yield value.numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode()


def _version() -> str:
    try:
        return importlib.metadata.version("compressed-tensors")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _digest(parts: Sequence[bytes]) -> str:
    result = hashlib.sha256()
    for part in parts:
        result.update(part)
    return result.hexdigest()[:16]
