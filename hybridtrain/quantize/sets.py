"""Held-out rows, drawn by seed into three sets: to search a plan on, to verify it, and to report it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybridtrain.errors import refusal
from hybridtrain.runtime import hashing
from hybridtrain.types import IGNORE_INDEX, Batch

ROWS = "quantize.eval_rows"
_SEARCHED = 8
"""Rows are enough to find the order of steps: a layer's KL on them ranks it as on fifty."""
_FEWEST = 16
_POOL = 16
"""quantize.eval_rows are drawn from this many times as many held-out rows, evenly spread over all of them."""


@dataclass(frozen=True)
class Sets:
    """Micro-batches of three sets of rows; none is in two."""

    search: Sequence[Batch]
    verify: Sequence[Batch]
    report: Sequence[Batch]
    words: str
    """How they were drawn."""


def pool(rows: int) -> int:
    """Of how many rows to draw `rows`; 0: all."""
    return _POOL * rows or 1 << 20


def drawn(batches: Iterable[Batch], *, rows: int, seed: int) -> Sets:
    """`rows` (0: all) of the rows of batches, in an order of the seed: the first are searched on, and the
    rest is halved. Rows without labels are left out. Raises UserError for too few.
    """
    given = list(batches)
    whole = _joined(given)
    counted = (whole.labels_BT != IGNORE_INDEX).any(1).nonzero().flatten().numpy()
    order = counted[hashing.keys(counted, name=f"hybridtrain plan {seed}").argsort()]
    taken = order[: rows or len(order)]
    if len(taken) < _FEWEST:
        raise refusal(
            ROWS,
            rows,
            f"{len(taken)} held-out rows are too few to search a plan on, to verify it and to report it",
            allowed=f"{_FEWEST} rows or more",
            instead="more held-out rows, or a smaller data.seq_len",
        )
    half = _SEARCHED + (len(taken) - _SEARCHED) // 2
    parts = taken[:_SEARCHED], taken[_SEARCHED:half], taken[half:]
    search, verify, report = (_batches(whole, part, size=len(given[0].input_ids_BT)) for part in parts)
    words = "{} to search on, {} to verify, {} to report".format(*map(len, parts))
    return Sets(
        search,
        verify,
        report,
        words=f"of {len(counted)} held-out rows, in the order of run.seed={seed}: {words}",
    )


def _joined(batches: Sequence[Batch]) -> Batch:
    """One batch of all rows."""
    first = batches[0]
    names = [each.name for each in dataclasses.fields(first) if isinstance(getattr(first, each.name), Tensor)]
    joined: dict[str, Any] = {name: torch.cat([getattr(each, name) for each in batches]) for name in names}
    return dataclasses.replace(first, **joined)


def _batches(whole: Batch, rows: np.ndarray, *, size: int) -> list[Batch]:
    parts = [torch.from_numpy(rows[start : start + size]) for start in range(0, len(rows), size)]
    return [whole.map(lambda tensor, part=part: tensor[part]) for part in parts]  # type: ignore[misc]
