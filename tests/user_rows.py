"""Rows of a program's own, and a config that trains on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import hybridtrain as ht

SEQ, VOCAB = 32, 300


class Numbers:
    """Rows of 20 to 33 tokens, of which every fifth is not learnt."""

    def __init__(self, count: int, *, first: int) -> None:
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def row(self, index: int) -> Any:
        ids = (np.arange(20 + index % 14) * (1 + (index + self.first) % 7) + index) % 250
        return ids, np.arange(len(ids)) % 5 != 0


def config_of(run: Path, *words: str) -> Any:
    given = [
        f"run.dir={run}",
        "model=tiny",
        f"model.config.vocab_size={VOCAB}",
        f"data.seq_len={SEQ}",
        "batch.global_batch_size=4",
        "batch.micro_batch_size=1",
    ]
    return ht.compose(
        *given, "train.steps=6", "train.log_every=1", "schedule=constant", "optim.lr=0.01", *words
    )
