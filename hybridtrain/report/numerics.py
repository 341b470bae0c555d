"""numerics.jsonl of a run as arrays for the heat map: a row for each module, a column for each sample."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from hybridtrain.precision.numerics import Sample, sample_of

MOST_SAMPLES = 240
"""Columns of the heat map; of more samples every n-th is read."""


@dataclass(frozen=True)
class Numerics:
    """(modules, samples) arrays, float64, NaN where a sample has no such value."""

    modules: tuple[str, ...]
    steps: tuple[int, ...]
    formats: tuple[str, ...]
    """In which underflow is judged."""
    underflow: np.ndarray
    """Share, the largest of input, weight and output gradient."""
    role: np.ndarray
    """The role with that share, str."""
    amax: np.ndarray
    """Of the input; of a module without, of its weight."""
    rms: np.ndarray
    snr: np.ndarray
    """In dB; as amax."""
    ratio: np.ndarray
    """Update to weight, the largest of the module's parameters."""
    realised: np.ndarray
    """Share of the update that rounding has left, the smallest of the module's parameters."""
    broken: np.ndarray
    """Whether a number is not finite, or input or gradient are all zeros; bool."""


def of_lines(lines: Iterable[str]) -> tuple[Numerics | None, int]:
    """(numerics, number of damaged lines); None without a sample."""
    complete = [line for line in lines if line.endswith("\n")]  # the last is still being written
    samples: dict[int, Sample] = {}
    bad = 0
    every = max(1, -(-len(complete) // MOST_SAMPLES))
    for line in complete[::every]:
        try:
            sample = sample_of(json.loads(line))
            samples[sample.step] = sample
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            bad += 1
    return (_arrays([samples[step] for step in sorted(samples)]) if samples else None), bad


def _arrays(samples: list[Sample]) -> Numerics:
    modules = tuple(dict.fromkeys(name for sample in samples for name in sample.modules))
    shape = (len(modules), len(samples))
    underflow, amax, rms, snr, ratio, realised = (np.full(shape, np.nan) for _ in range(6))
    broken, role = np.zeros(shape, dtype=bool), np.full(shape, "", dtype="<U1")
    rows = {name: row for row, name in enumerate(modules)}
    for column, sample in enumerate(samples):
        for name, update in sample.parameters.items():
            if (row := rows.get(name.rpartition(".")[0])) is not None:
                ratio[row, column] = np.fmax(ratio[row, column], _or_nan(update.ratio))
                realised[row, column] = np.fmin(realised[row, column], _or_nan(update.realised))
        for name, row in rows.items():
            roles = sample.modules.get(name, {})
            judged = {
                key: each.shares(sample.formats[key]).underflow
                for key, each in roles.items()
                if each.histogram
            }
            if judged:
                worst = max(judged, key=lambda key: judged[key])
                underflow[row, column], role[row, column] = judged[worst], worst
            shown = roles.get("x") or roles.get("w")
            if shown is not None:
                amax[row, column] = shown.amax
                rms[row, column], snr[row, column] = _or_nan(shown.rms), _or_nan(shown.snr)
            broken[row, column] = any(
                each.non_finite or (key in ("x", "g") and each.amax == 0) for key, each in roles.items()
            )
    formats = dict.fromkeys(form for sample in samples for form in sample.formats.values())
    return Numerics(
        modules,
        tuple(sample.step for sample in samples),
        tuple(formats),
        underflow,
        role,
        amax,
        rms,
        snr,
        ratio,
        realised,
        broken,
    )


def _or_nan(value: float | None) -> float:
    return np.nan if value is None else value
