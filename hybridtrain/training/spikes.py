"""Loss spikes: losses far above those of the last steps, on a logarithmic scale.

    z = (log v - median) / (1.4826 MAD + 0.001)        over the last WINDOW values, from LEAST values on

MAD: median of the absolute differences from the median; 1.4826 MAD is the standard deviation of normal noise
(Rousseeuw and Croux, "Alternatives to the Median Absolute Deviation", 1993). A spike changes neither. Values
that are spikes stay out of the window, so that the next one is compared with the steps before both.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

WINDOW, LEAST = 64, 20
_NORMAL, _FLOOR = 1.4826, 1e-3
"""The floor keeps a loss that hardly changes from making spikes of its noise."""
_LARGEST = math.log(sys.float_info.max)


class Spikes:
    """The windows of loss and gradient norm. The same on all ranks, from values that are."""

    def __init__(self, *, threshold: float, grad_threshold: float, state: Mapping[str, Any]):
        """`threshold`: z of the loss; `grad_threshold`: z that the gradient norm must exceed too, 0: none.
        `state`: of a checkpoint, or empty."""
        self.threshold, self.grad_threshold = threshold, grad_threshold
        self.losses: deque[float] = deque(state.get("losses", ()), maxlen=WINDOW)
        self.norms: deque[float] = deque(state.get("norms", ()), maxlen=WINDOW)
        self.frozen_until = int(state.get("frozen_until", 0))
        """Steps done before which nothing is added: after a rollback, those that are done again."""

    @property
    def limits(self) -> tuple[float, float] | None:
        """(loss, gradient norm): a step above both is a spike. None: too few values yet."""
        if len(self.losses) < LEAST:
            return None
        of_norm = limit(self.norms, z=self.grad_threshold) if self.grad_threshold else -math.inf
        return limit(self.losses, z=self.threshold), of_norm

    def is_spike(self, loss: float, norm: float) -> bool:
        limits = self.limits
        return limits is not None and loss > limits[0] and norm > limits[1]

    def add(self, loss: float, norm: float, *, step: int) -> None:
        """Add the values of a step that is none. `step`: steps done with it."""
        if step > self.frozen_until and loss > 0 and norm > 0:
            self.losses.append(loss)
            self.norms.append(norm)

    def describe(self, loss: float, norm: float) -> str:
        """Both values with their z, for people."""
        return (
            f"loss {loss:.4g}, z = {score(self.losses, loss):.1f}; "
            f"gradient norm {norm:.4g}, z = {score(self.norms, norm):.1f}"
        )

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "version": 1,
            "losses": list(self.losses),
            "norms": list(self.norms),
            "frozen_until": self.frozen_until,
        }


def score(values: Sequence[float], value: float) -> float:
    """z of a positive value."""
    middle, width = _centre(values)
    return (math.log(value) - middle) / width


def limit(values: Sequence[float], *, z: float) -> float:
    """The value with this z; infinite above the largest number."""
    middle, width = _centre(values)
    exponent = middle + z * width
    return math.exp(exponent) if exponent < _LARGEST else math.inf


def _centre(values: Sequence[float]) -> tuple[float, float]:
    """Median and width of the logarithms."""
    logs = [math.log(value) for value in values]
    middle = median(logs)
    return middle, _NORMAL * median(abs(one - middle) for one in logs) + _FLOOR
