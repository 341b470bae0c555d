"""The embedded corpus, Python's own standard library: it takes seconds, so whoever needs it first prepares it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from hybridtrain.config.schema import DataConfig, PrepareConfig
from hybridtrain.data.corpus import Corpus


def missing(data: DataConfig) -> bool:
    """Whether the corpus is the embedded one and has yet to be prepared."""
    return bool(data.path) and data.source == ["stdlib"] and data.tokenizer == "train" and not _marker(data).exists()


def _marker(data: DataConfig) -> Path:
    return Path(data.path) / "corpus.json"


def open_or_prepare(data: DataConfig, *, timeout_s: float) -> Corpus:
    """Open the corpus at `data.path`; if it is the embedded one and not there yet, one process of each machine prepares it first."""
    marker = _marker(data)
    if missing(data):
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            from hybridtrain.data.prepare.tokenize import prepare_after  # on a shared disk one machine prepares, and the others wait for it

            return Corpus.open(prepare_after(data, options=PrepareConfig(), wait_s=timeout_s))
        deadline = time.monotonic() + timeout_s
        while not marker.exists() and time.monotonic() < deadline:
            time.sleep(0.2)
    return Corpus.open(data.path)
