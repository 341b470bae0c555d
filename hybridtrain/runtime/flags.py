"""Flags that any rank raises and all ranks see after the same step, without a collective of their own.

a rank raises one  ->  counted over all ranks beside the tokens of the next step, on the device  ->  copied to the host
                   ->  read after that step; on a GPU after the one that follows, when the copy is there without waiting for it
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Flags:
    """The flags of `names`. Raised and read between steps; the engine sends them with each train_step."""

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        self.raised: set[str] = set()
        """What this rank says with every step, until it takes it out again."""
        self._seen: Mapping[str, int] = {}
        self._sent: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def append_to(self, counts: Tensor) -> Tensor:
        """`counts` (K, int64) and this rank's flags as one vector, to be added up over all ranks."""
        vector = counts.new_zeros(len(counts) + len(self.names))
        vector[: len(counts)].copy_(counts)
        for place, name in enumerate(self.names, start=len(counts)):
            if name in self.raised:
                vector[place].fill_(1)
        return vector

    def copy_to_host(self, vector: Tensor) -> None:
        """The vector now has the sums: begin to copy them to the host."""
        if not self.names:
            return
        counts, event = vector[len(vector) - len(self.names) :], None
        if counts.is_cuda:
            counts = torch.empty(len(self.names), dtype=counts.dtype, pin_memory=True).copy_(counts, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._sent.append((counts, event))

    def read(self) -> Mapping[str, int]:
        """How many ranks have raised each flag, the same on every rank. Called once after each step."""
        while self._sent and (len(self._sent) > 1 or self._sent[0][1] is None):
            counts, event = self._sent.popleft()
            if event is not None:
                event.synchronize()  # of the step before: its tokens were counted before the device began the work that is under way
            self._seen = dict(zip(self.names, counts.tolist(), strict=True))
        return self._seen

    def forget(self, name: str) -> None:
        """Take a flag out; what has been sent of it is not read any more. All ranks do so after the same step."""
        self.raised.discard(name)
        self._sent.clear()
        self._seen = {}
