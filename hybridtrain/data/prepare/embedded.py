"""The built-in corpus, Python's standard library.

Preparing it takes seconds, so the first command that needs it does so.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from hybridtrain.config.schema import DataConfig, PrepareConfig
from hybridtrain.data.corpus import Corpus


def missing(data: DataConfig) -> bool:
    """Whether the corpus is the built-in one and is not prepared yet."""
    return (
        bool(data.path)
        and data.source == ["stdlib"]
        and data.tokenizer == "train"
        and not _marker(data).exists()
    )


def _marker(data: DataConfig) -> Path:
    return Path(data.path) / "corpus.json"


def open_or_prepare(data: DataConfig, *, timeout_s: float) -> Corpus:
    """Open the corpus at `data.path`. If it is the built-in one and not prepared yet, prepare it first.

    Local rank 0 of each machine tries to prepare; on a shared disk one of them does, and all others
    wait up to `timeout_s`.
    """
    marker = _marker(data)
    if missing(data):
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            from hybridtrain.data.prepare.tokenize import prepare_after  # imports tokenizers

            return Corpus.open(prepare_after(data, options=PrepareConfig(), wait_s=timeout_s))
        deadline = time.monotonic() + timeout_s
        while not marker.exists() and time.monotonic() < deadline:
            time.sleep(0.2)
    return Corpus.open(data.path)
