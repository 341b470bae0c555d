"""Writes safetensors files one tensor at a time; the safetensors library needs all tensors of a file at once.

The format (huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON header with dtype,
shape and byte range of every tensor, then the bytes in the header's order without gaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of one tensor of a file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Size of its values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(
    file: Path,
    *,
    specs: Sequence[TensorSpec],
    tensor: Callable[[TensorSpec], torch.Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write `file`. `metadata`: texts in its header, besides the format.

    `tensor` returns the values of a spec, on the CPU, with its shape and dtype; called once
    for each, in order.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.size],
        }
        offset += spec.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # align the values to 8 bytes for memory-mapping
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for spec in specs:
            values = tensor(spec)
            assert values.dtype == spec.dtype, f"{spec.name}: {values.dtype} for {spec.dtype}"
            assert tuple(values.shape) == spec.shape, f"{spec.name}: {values.shape} for {spec.shape}"
            stream.write(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())
