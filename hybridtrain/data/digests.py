"""What a file held when it was written: its size, a hash of some of its bytes that is compared often, and one of all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SAMPLES, SAMPLE_BYTES = 16, 4096
_READ_BYTES = 1 << 22


def add_sample(digest: hashlib._Hash, file: Path) -> None:
    """Add the size of a file and 16 blocks of it, from its first byte to its last. Raises OSError."""
    size = file.stat().st_size
    digest.update(f"{size} ".encode())
    with file.open("rb") as stream:
        for sample in range(SAMPLES):
            stream.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
            digest.update(stream.read(SAMPLE_BYTES))


def sample_hash(file: Path) -> str:
    """sha256 over the size and a sample of the bytes: 64 KiB are read."""
    digest = hashlib.sha256()
    add_sample(digest, file)
    return digest.hexdigest()


def full_hash(file: Path) -> str:
    """sha256 over all bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def difference(file: Path, written: Mapping[str, Any], *, by: str, of: Callable[[Path], str], writer: str) -> str:
    """How a file differs from what `writer` says it wrote: in its size, or in the record `by`, which `of` computes. Empty: not at all.

    Raises KeyError, TypeError or ValueError for a record that is damaged.
    """
    try:
        size = file.stat().st_size
        if size != written["bytes"]:
            return f"has {size:,} bytes, and {writer} wrote {written['bytes']:,}"
        return "" if of(file) == written[by] else f"holds other bytes than {writer} wrote"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def record(file: Path) -> dict[str, Any]:
    """{bytes, sample, sha256} of a file, for corpus.json."""
    return {"bytes": file.stat().st_size, "sample": sample_hash(file), "sha256": full_hash(file)}
