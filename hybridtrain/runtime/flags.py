"""Flags that any rank raises and all ranks see after the same step, without an additional collective.

a rank raises one  ->  summed over all ranks together with the token count of the next step, on the device
                   ->  copied to the host  ->  read after that step; on a GPU one step later, without waiting
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Flags:
    """The flags `names`.

    The loop raises and reads them between steps; the engine sums them in each train_step.
    """

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        self.raised: set[str] = set()
        """Flags that this rank raises with every step, until it removes them."""
        self._seen: Mapping[str, int] = {}
        self._sent: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def append_to(self, counts: Tensor) -> Tensor:
        """`counts` (K, int64) and this rank's flags (0 or 1) as one vector, to be summed over all ranks."""
        vector = counts.new_zeros(len(counts) + len(self.names))
        vector[: len(counts)].copy_(counts)
        for place, name in enumerate(self.names, start=len(counts)):
            if name in self.raised:
                vector[place].fill_(1)
        return vector

    def copy_to_host(self, vector: Tensor) -> None:
        """Start to copy the flags of `vector`, which now holds the sums, to the host."""
        if not self.names:
            return
        counts, event = vector[len(vector) - len(self.names) :], None
        if counts.is_cuda:
            counts = torch.empty(len(self.names), dtype=counts.dtype, pin_memory=True).copy_(
                counts, non_blocking=True
            )
            event = torch.cuda.Event()
            event.record()
        self._sent.append((counts, event))

    def read(self) -> Mapping[str, int]:
        """How many ranks have raised each flag, the same on every rank. Called once after each step."""
        while self._sent and (len(self._sent) > 1 or self._sent[0][1] is None):
            counts, event = self._sent.popleft()
            if event is not None:
                event.synchronize()  # of the previous step: the device has passed it
            self._seen = dict(zip(self.names, counts.tolist(), strict=True))
        return self._seen

    def forget(self, name: str) -> None:
        """Lower a flag and drop sums that have not been read yet. All ranks do so after the same step."""
        self.raised.discard(name)
        self._sent.clear()
        self._seen = {}
