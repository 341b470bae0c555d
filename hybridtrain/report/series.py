"""Reduces long series to what is visible in a plot."""

from __future__ import annotations

import itertools

import numpy as np

BUCKETS = 500  # a plot is about 500 pixels wide; two points per bucket keep every spike


def thin(x: np.ndarray, y: np.ndarray, *, buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and highest point in each of `buckets` intervals of equal length, and the
    first and last point.

    x and y: float64 (n,), y with NaN for gaps. Short series are returned unchanged.
    """
    if len(x) <= 2 * buckets:
        return x, y
    edges = np.linspace(0, len(y), buckets + 1).astype(int)
    kept = {0, len(y) - 1}
    for first, end in itertools.pairwise(edges):
        stretch = y[first:end]
        kept |= (
            {first + int(np.nanargmin(stretch)), first + int(np.nanargmax(stretch))}
            if np.isfinite(stretch).any()
            else {int(first)}
        )
    index = np.array(sorted(kept))
    return x[index], y[index]


def smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over 1/30 of the points.

    Near the start the window stays symmetric and shrinks, so as not to bend a falling curve.
    """
    half = max(1, len(values) // 60)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    centre = np.arange(len(values))
    reach = np.minimum(half, centre)
    first, end = centre - reach, np.minimum(centre + reach + 1, len(values))
    return (sums[end] - sums[first]) / (end - first)


def sample(x: np.ndarray, y: np.ndarray, *, points: int) -> tuple[np.ndarray, np.ndarray]:
    """`points` points at equal distances, for a smooth curve."""
    if len(x) <= points:
        return x, y
    index = np.linspace(0, len(x) - 1, points).round().astype(int)
    return x[index], y[index]
