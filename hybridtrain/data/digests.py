"""Digests of a file: its size, a hash of a sample of its bytes, which is quick to compare, and a
hash of all bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SAMPLES, SAMPLE_BYTES = 16, 4096
_READ_BYTES = 1 << 22


def add_sample(digest: hashlib._Hash, file: Path) -> None:
    """Add the size of a file and 16 evenly spaced blocks of it to `digest`. Raises OSError."""
    size = file.stat().st_size
    digest.update(f"{size} ".encode())
    with file.open("rb") as stream:
        for sample in range(SAMPLES):
            stream.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
            digest.update(stream.read(SAMPLE_BYTES))


def sample_hash(file: Path) -> str:
    """sha256 over the size and a sample of 64 KiB. Raises OSError."""
    digest = hashlib.sha256()
    add_sample(digest, file)
    return digest.hexdigest()


def full_hash(file: Path) -> str:
    """sha256 over all bytes. Raises OSError."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def difference(
    file: Path, written: Mapping[str, Any], *, by: str, of: Callable[[Path], str], writer: str
) -> str:
    """How a file differs from its record `written`; empty if it does not.

    Compares the size, and key `by`, computed by `of`. `writer`: who wrote the file, for the message. Raises
    KeyError, TypeError or ValueError for a damaged record.
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
