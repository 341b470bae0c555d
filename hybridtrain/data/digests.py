"""What a file held when it was written: its size, a hash of some of its bytes that is compared often, and one of all of them."""

from __future__ import annotations

import hashlib
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


def sampled(file: Path) -> str:
    """sha256 over the size and a sample of the bytes: 64 KiB are read."""
    digest = hashlib.sha256()
    add_sample(digest, file)
    return digest.hexdigest()


def whole(file: Path) -> str:
    """sha256 over all bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def of(file: Path) -> dict[str, Any]:
    """{bytes, sample, sha256} of a file, for corpus.json."""
    return {"bytes": file.stat().st_size, "sample": sampled(file), "sha256": whole(file)}
