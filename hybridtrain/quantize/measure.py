"""Two models on the same held-out rows: losses, and how far the predictions are apart.

    KL         sum over tokens of p log(p / q): p of the reference, q of the other; in nats
    top-1      share of the positions at which both find the same token the likeliest
    SNR        of the logits: 10 log10 (sum p^2 / sum (p - q)^2), in dB, of logits less their mean

Sums are kept for each row: differences between two models are paired, and their errors are those of a ratio
of sums over rows.

B rows, T positions, V vocabulary; M positions with a label.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybridtrain.models.build import logits, pair_logits
from hybridtrain.models.heads import text_logits
from hybridtrain.types import IGNORE_INDEX, Batch, PairBatch, TextBatch

_NAMES = ("tokens", "loss", "other_loss", "kl", "same", "signal", "noise")


@dataclass(frozen=True)
class Mean:
    """A mean over tokens, and the standard error of it over rows (nan of a single row)."""

    value: float
    error: float


@dataclass(frozen=True)
class Measured:
    """Sums for each row, fp64 (rows, len(_NAMES))."""

    sums: np.ndarray

    def of(self, name: str) -> np.ndarray:
        return self.sums[:, _NAMES.index(name)]

    @property
    def tokens(self) -> int:
        return int(self.of("tokens").sum())

    def mean(self, name: str) -> Mean:
        """Of loss, other_loss, kl or same."""
        return _ratio(self.of(name), self.of("tokens"))

    @property
    def change(self) -> Mean:
        """Loss of the other less that of the reference: about the relative change of the perplexity."""
        return _ratio(self.of("other_loss") - self.of("loss"), self.of("tokens"))

    @property
    def snr(self) -> float:
        """Of the logits, dB."""
        signal, noise = self.of("signal").sum(), self.of("noise").sum()
        if not noise:
            return math.inf
        return 10 * math.log10(signal / noise) if signal else -math.inf


def _ratio(sums: np.ndarray, counts: np.ndarray) -> Mean:
    mean = sums.sum() / counts.sum()
    rows = len(sums)
    spread = np.square(sums - mean * counts).sum() * rows / (rows - 1) if rows > 1 else math.nan
    return Mean(float(mean), math.sqrt(spread) / float(counts.sum()))


def measure(reference: Any, other: Any, batches: Iterable[Batch]) -> Measured:
    """Compare two plain transformers models with the same tokens."""
    return against(predicted(reference, batches), other)


def predicted(model: Any, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Batch]]:
    """The logits of a model on batches, one after the other."""
    for batch in batches:
        yield outputs(model, batch), batch


def against(reference: Iterable[tuple[Tensor, Batch]], other: Any) -> Measured:
    """Compare a model with the logits of another, see `predicted`."""
    parts = []
    for p_BTV, batch in reference:
        q_BTV, labels_BT = outputs(other, batch), batch.labels_BT[:, : p_BTV.shape[1]].to(p_BTV.device)
        parts += [_row(p, q, labels) for p, q, labels in zip(p_BTV, q_BTV, labels_BT, strict=True)]
    return Measured(np.array([part for part in parts if part[0]]).reshape(-1, len(_NAMES)))


@torch.inference_mode()
def outputs(model: Any, batch: Batch) -> Tensor:
    """Of tokens, (B, T, V); of a classifier of texts with T = 1."""
    here = batch.to(model.device)
    if isinstance(here, PairBatch):
        return pair_logits(model, here)[0]
    if isinstance(here, TextBatch):
        found = text_logits(model, here)
        return found if found.dim() == 3 else found.unsqueeze(1)
    return logits(model, here.input_ids_BT, position_ids_BT=here.position_ids_BT)


def _row(p_TV: Tensor, q_TV: Tensor, labels_T: Tensor) -> list[float]:
    """The sums of a row."""
    counted = labels_T != IGNORE_INDEX
    p, q, labels = p_TV[counted].float(), q_TV[counted].float(), labels_T[counted, None]
    if not len(labels):
        return [0.0] * len(_NAMES)
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    centred = p - p.mean(-1, keepdim=True)
    noise = centred - (q - q.mean(-1, keepdim=True))
    return [
        float(len(labels)),
        -log_p.gather(1, labels).sum(dtype=torch.float64).item(),
        -log_q.gather(1, labels).sum(dtype=torch.float64).item(),
        (log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64).item(),
        (p.argmax(-1) == q.argmax(-1)).sum().item(),
        centred.square().sum(dtype=torch.float64).item(),
        noise.square().sum(dtype=torch.float64).item(),
    ]
