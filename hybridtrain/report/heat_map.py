"""Heat maps of the numerics monitor: module x sampled step, for what a module computes and its updates.

Cells are an image in one color, whose opacity is the value, so that it fits a light and a dark page.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hybridtrain.report.numerics import Numerics
from hybridtrain.report.plots import ALARM, COLORS, STYLE, Plot

MOST_NAMES = 64
"""Rows up to which each has its name; of more, only layers are named."""
MOST_LAYERS = 40
_TICKS = 7
_ACROSS = 50  # letters below a map, side by side
_LOGARITHMIC = {
    "amax": "Largest magnitude of inputs",
    "rms": "Root mean square of inputs",
    "ratio": "Update by weight",
}
_LINEAR = {"snr": "Signal-to-noise ratio of inputs, dB", "realised": "Realised share of the update"}


def plots(numerics: Numerics) -> Iterator[Plot]:
    """The maps; one without a value is left out."""
    formats = " and ".join(numerics.formats)
    shares = np.sqrt(numerics.underflow)  # so that a share of 0.01 is visible
    words = f"rounded to zero in {formats}; full color: all"
    yield _plot("numerics", f"Underflow in {formats}", numerics, shares, words)
    for key, title in _LOGARITHMIC.items():
        values = getattr(numerics, key)
        with np.errstate(divide="ignore", invalid="ignore"):
            yield from _of_range(key, title, numerics, np.log2(values), "from 2^{:.0f}, pale, to 2^{:.0f}")
    for key, title in _LINEAR.items():
        yield from _of_range(key, title, numerics, getattr(numerics, key), "from {:.3g}, pale, to {:.3g}")


def _of_range(key: str, title: str, numerics: Numerics, values: np.ndarray, words: str) -> Iterator[Plot]:
    """The map of values between their smallest and their largest; none without a value."""
    known = values[np.isfinite(values)]
    if len(known):
        low, high = known.min(), known.max()
        opacity = 0.08 + 0.92 * (values - low) / max(high - low, 1.0)
        yield _plot(f"numerics_{key}", title, numerics, opacity, words.format(low, high))


def _plot(name: str, title: str, numerics: Numerics, opacity: np.ndarray, words: str) -> Plot:
    columns = len(numerics.steps)
    shown = sorted({round(place) for place in np.linspace(0, columns - 1, min(columns, _TICKS))})
    return of_rows(
        name,
        title,
        opacity,
        broken=numerics.broken,
        rows=numerics.modules,
        columns={place: f"{numerics.steps[place]:,}" for place in shown},
        below=f"sampled optimizer step\n{words}; red: not finite, or all zeros",
        tips=[_worst(numerics, row) for row in range(len(opacity))],
    )


def of_rows(
    name: str,
    title: str,
    opacity: np.ndarray,
    *,
    broken: np.ndarray,
    rows: tuple[str, ...],
    columns: Mapping[int, str],
    below: str,
    tips: Sequence[str],
) -> Plot:
    """A map of modules. `opacity`: (rows, columns), 0 to 1; `broken`: cells in red;
    `columns`: place -> name; `tips`: what the page says of a row.
    """
    count, width = opacity.shape
    pixels = np.zeros((count, width, 4))
    pixels[..., :3] = to_rgb(COLORS[0])
    pixels[..., 3] = np.clip(np.nan_to_num(opacity, nan=0.0, posinf=1.0, neginf=0.0), 0, 1)
    pixels[broken] = (*to_rgb(ALARM), 1.0)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.8, float(np.clip(1.0 + 0.135 * count, 2.2, 9.0))))
        axes = figure.add_subplot()
        axes.grid(visible=False)
        axes.set_title(title)
        axes.set_xlabel(below, fontsize=7.5)
        extent = (-0.5, width - 0.5, count - 0.5, -0.5)
        axes.imshow(pixels, aspect="auto", interpolation="nearest", extent=extent)
        is_long = sum(map(len, columns.values())) > _ACROSS
        slanted: dict[str, Any] = {"rotation": 25, "ha": "right"} if is_long else {}
        axes.set_xticks(list(columns), list(columns.values()), parse_math=False, **slanted)
        _name_rows(axes, rows)
        for row, (module, tip) in enumerate(zip(rows, tips, strict=True)):
            words = f"tip:{row}:{module}: {tip}"
            axes.add_patch(Rectangle((-0.5, row - 0.5), width, 1, alpha=0.01, linewidth=0, gid=words))
        return Plot(name, f"{title}, {count} modules", figure)


def _name_rows(axes: Axes, modules: tuple[str, ...]) -> None:
    """Names of all rows, or of layers at their first row."""
    if len(modules) <= MOST_NAMES:
        names = [module.removeprefix("model.").removeprefix("layers.") for module in modules]
        size = 7.0 if len(modules) <= 30 else 5.0
        axes.set_yticks(range(len(modules)), names, fontsize=size, parse_math=False)
        return
    layers: dict[str, int] = {}
    for row, module in enumerate(modules):
        number = next((part for part in module.split(".") if part.isdecimal()), None)
        if number is not None:
            layers.setdefault(f"layer {number}", row)
    chosen = list(layers.items())[:: -(-len(layers) // MOST_LAYERS) or 1]
    axes.set_yticks([row for _, row in chosen], [name for name, _ in chosen], fontsize=6.0)


def _worst(numerics: Numerics, row: int) -> str:
    shares = numerics.underflow[row]
    if np.isnan(shares).all():
        return "no numbers"
    worst = int(np.nanargmax(shares))
    broken = numerics.broken[row]
    step = numerics.steps[int(np.argmax(broken))]
    return (
        f"underflow at most {shares[worst]:.2%} ({numerics.role[row, worst]}, step {numerics.steps[worst]})"
        + (f"; not finite or all zeros at step {step}" if broken.any() else "")
    )
