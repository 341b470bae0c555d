"""The plots of one or several runs, as matplotlib figures. Plots without values are left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, FuncFormatter, MaxNLocator

from hybridtrain.report.history import History
from hybridtrain.report.series import BUCKETS, sample, smooth, thin

INK, MUTED, GRID, PAPER, ALARM = "#1f2431", "#6b7281", "#e5e7ea", "#fefefe", "#c8102f"
COLORS = ("#2f6fde", "#d9660b", "#0d9373", "#b0529c", "#8a6d1b", "#3aa2c9", "#7a5af0", "#5f6b7a")
"""Distinguishable with all types of color vision, on white and, in the page's variant, on black."""
MARKS = {"checkpoint": ("^", MUTED), "resumed": ("|", INK), "skipped": ("v", ALARM), "failed": ("X", ALARM)}
SMOOTH_FROM = 60  # curves with at least this many points are drawn pale, with a running mean on top
MOST_MARKS = 200
LABEL_CHARS = 18
MOST_LABELS = 14  # names at the ends of curves; with more, the page shows them under the mouse pointer

STYLE: dict[Any, Any] = {
    "figure.figsize": (5.8, 3.3),
    "figure.constrained_layout.use": True,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 9,
    "axes.labelsize": 8.5,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "lines.linewidth": 1.5,
    "lines.solid_joinstyle": "round",
    "path.simplify": False,  # series are thinned already, and the page's script reads values from the paths
    "svg.fonttype": "none",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.labelcolor": MUTED,
}


@dataclass(frozen=True)
class Plot:
    """A figure, with its file name and its title."""

    name: str
    title: str
    figure: Figure


@dataclass(frozen=True)
class Series:
    """One curve: finite or NaN values `y` over `x`, float64."""

    label: str
    color: str
    x: np.ndarray
    y: np.ndarray
    dots: bool
    """Whether each point has a marker, for few points."""
    line: str
    """- or, for more runs than colors, --."""


@dataclass(frozen=True)
class Axis:
    """An x axis."""

    name: str
    label: str
    of: Callable[[History], np.ndarray]
    formatter: Formatter | None


STEPS = Axis("step", "optimizer step", lambda history: history.columns["step"], None)
TOKENS = Axis("tokens", "tokens seen", lambda history: history.columns["tokens_seen"], EngFormatter(sep=""))
TIME = Axis("time", "training time, hours", lambda history: history.seconds / 3600, None)
AXES = (STEPS, TOKENS, TIME)


def of_run(history: History) -> Iterator[Plot]:
    """The plots of one run: loss over steps, tokens and time; other metrics that have values over steps."""
    for axis in AXES:
        series = [_series(history, axis, "loss", label="train", number=0)]
        series += [_series(history, axis, "eval_loss", label="held out", number=1)]
        yield from _plot(
            f"loss_{axis.name}" if axis != STEPS else "loss",
            "Loss",
            "nats per token",
            series,
            axis=axis,
            marked=history,
        )
    for name, title, unit, key in METERS:
        if key != "loss_scale" or len(set(history.known(key))) > 1:  # without fp16 it is always 1
            yield from _plot(
                name,
                title,
                unit,
                [_series(history, STEPS, key, label=title.lower(), number=0)],
                axis=STEPS,
                marked=None,
            )
    skipped = np.nancumsum(history.columns["skipped"])
    if len(skipped) and skipped[-1]:
        series = [Series("skipped", ALARM, history.columns["step"], skipped, dots=False, line="-")]
        yield from _plot(
            "skipped", "Skipped updates", "updates since the start", series, axis=STEPS, marked=None
        )


def of_runs(histories: Sequence[History], *, names: Sequence[str]) -> Iterator[Plot]:
    """The plots of several runs together."""
    for key, title in (("loss", "Training loss"), ("eval_loss", "Loss on held-out text")):
        for axis in AXES:
            name = key if axis == STEPS else f"{key}_{axis.name}"
            yield from _plot(
                name, title, "nats per token", _all(histories, names, axis, key), axis=axis, marked=None
            )
    for name, title, unit, key in METERS:
        if name in ("grad_norm", "throughput", "mfu", "memory", "lr"):
            yield from _plot(name, title, unit, _all(histories, names, STEPS, key), axis=STEPS, marked=None)


METERS = (
    ("grad_norm", "Gradient norm", "L2 norm before clipping", "grad_norm"),
    ("lr", "Learning rate", "learning rate", "lr"),
    ("throughput", "Throughput", "tokens per second, all devices", "tokens_per_s"),
    ("mfu", "Model FLOPs utilization", "share of the devices' peak", "mfu"),
    ("memory", "Peak memory", "GiB per process, largest of all", "max_memory_gib"),
    ("loss_scale", "Loss scale", "loss scale", "loss_scale"),
)
MAPS = {
    "numerics": "underflow",
    "numerics_amax": "amax",
    "numerics_rms": "rms",
    "numerics_ratio": "update",
    "numerics_snr": "SNR",
    "numerics_realised": "realised",
}
"""Names of heat maps (heat_map.py), which share a place on the page -> their tabs."""
NAMES = (
    *(f"{loss}{axis}" for loss in ("loss", "eval_loss") for axis in ("", "_tokens", "_time")),
    *(name for name, *_ in METERS),
    "skipped",
    *MAPS,
    "layout",
)
"""All names of plots."""
_NOISY = ("loss", "grad_norm", "throughput", "mfu")
_FROM_ZERO = ("grad_norm", "lr", "throughput", "mfu", "memory")


def _series(history: History, axis: Axis, key: str, *, label: str, number: int) -> Series:
    """The curve of `key`, in the style of number `number`."""
    x, y = axis.of(history), history.columns[key]
    if key == "eval_loss":
        x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    # A line of one or two points is hardly visible.
    dots, line = (
        int(np.isfinite(y).sum()) < (40 if key == "eval_loss" else 3),
        "--" if number >= len(COLORS) else "-",
    )
    return Series(label, COLORS[number % len(COLORS)], x, y, dots=dots, line=line)


def _all(histories: Sequence[History], names: Sequence[str], axis: Axis, key: str) -> list[Series]:
    return [
        _series(history, axis, key, label=name, number=n)
        for n, (history, name) in enumerate(zip(histories, names, strict=True))
    ]


def _plot(
    name: str, title: str, unit: str, series: Sequence[Series], *, axis: Axis, marked: History | None
) -> Iterator[Plot]:
    """Yield the plot; nothing if the series have no finite values."""
    drawn = [one for one in series if (np.isfinite(one.x) & np.isfinite(one.y)).any()]
    if not drawn:
        return
    kind = name.removesuffix(f"_{axis.name}")
    with mpl.rc_context(STYLE):
        figure = Figure()
        axes = figure.add_subplot()
        axes.set_title(title)
        axes.set_ylabel(unit)
        axes.set_xlabel(axis.label)
        tops = [
            _curve(axes, one, noisy=kind in _NOISY, steps=kind in ("memory", "loss_scale", "skipped"))
            for one in drawn
        ]
        _scale_x(axes, drawn, axis=axis)
        _scale_y(axes, drawn, kind=kind)
        if marked is not None:
            _marks(axes, marked, axis=axis)
        if 1 < len(drawn) <= MOST_LABELS:
            _label_ends(axes, drawn, tops)
        elif len(drawn) > 1:
            axes.set_title(f"{title}, {len(drawn):,} runs")
        yield Plot(name, title, figure)


def _curve(axes: Axes, series: Series, *, noisy: bool, steps: bool) -> float:
    """Draw a curve; returns its last y value. A long noisy curve is pale, with a running mean on top."""
    known = np.isfinite(series.x) & np.isfinite(series.y)
    style: dict[str, Any] = {"color": series.color, "linestyle": series.line, "gid": f"series:{series.label}"}
    if noisy and known.sum() >= SMOOTH_FROM:
        axes.plot(*thin(series.x, series.y, buckets=BUCKETS), color=series.color, alpha=0.28, linewidth=0.8)
        mean = smooth(series.y[known])
        axes.plot(*sample(series.x[known], mean, points=BUCKETS), **style)
        return float(mean[-1])
    dots: dict[str, Any] = {"marker": "o", "markersize": 3.5, "markeredgewidth": 0} if series.dots else {}
    axes.plot(
        *thin(series.x, series.y, buckets=BUCKETS),
        drawstyle="steps-post" if steps else "default",
        **dots,
        **style,
    )
    return float(series.y[known][-1])


def _scale_x(axes: Axes, series: Sequence[Series], *, axis: Axis) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=axis == STEPS, steps=[1, 2, 2.5, 5, 10]))
    if axis.formatter is not None:
        axes.xaxis.set_major_formatter(axis.formatter)
    elif axis == STEPS:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    end = max(float(np.nanmax(one.x)) for one in series)
    axes.set_xlim(0, 1.01 * end or 1)


def _scale_y(axes: Axes, series: Sequence[Series], *, kind: str) -> None:
    """A log scale if single values are far above the median; from 0 for metrics whose ratios matter."""
    values = np.concatenate([one.y[np.isfinite(one.y)] for one in series])
    if kind == "loss_scale":
        axes.set_yscale("log", base=2)
    elif kind not in ("lr", "skipped") and values.min() > 0 and values.max() > 30 * float(np.median(values)):
        axes.set_yscale("log")
    elif kind in _FROM_ZERO:
        axes.set_ylim(bottom=0, top=1.1 * values.max() or 1)
    if kind == "lr":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: scientific(value)))
    elif kind == "throughput":
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    elif kind == "mfu":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))


def scientific(value: float) -> str:
    """1.75e-3 for 0.00175; 0 for 0."""
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


def _marks(axes: Axes, history: History, *, axis: Axis) -> None:
    """Mark events at the lower edge; resumes and failures also as vertical lines."""
    steps, places = history.columns["step"], axis.of(history)
    for kind, (marker, color) in MARKS.items():
        at = np.array([event["step"] for event in history.events if event["kind"] == kind], dtype=float)
        if not len(at):
            continue
        x = np.interp(at[np.linspace(0, len(at) - 1, min(len(at), MOST_MARKS)).astype(int)], steps, places)
        if kind in ("resumed", "failed"):
            axes.vlines(
                x,
                0,
                1,
                transform=axes.get_xaxis_transform(),
                color=color,
                linewidth=0.8,
                linestyles=(0, (3, 3)),
            )
        low = np.full(len(x), 0.02)
        label = f"{len(at)} checkpoint{'s' if len(at) > 1 else ''}" if kind == "checkpoint" else kind
        axes.plot(
            x,
            low,
            marker,
            color=color,
            markersize=4,
            transform=axes.get_xaxis_transform(),
            clip_on=False,
            label=label,
        )
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="upper right", handletextpad=0.1, borderaxespad=0.2, labelspacing=0.3)


def _label_ends(axes: Axes, series: Sequence[Series], heights: Sequence[float]) -> None:
    """Write each curve's name at its right end, with enough distance between names."""
    end = axes.get_xlim()[1]
    to_share = axes.transData + axes.transAxes.inverted()
    shares = [float(to_share.transform((0, height))[1]) for height in heights]
    gap, taken = 0.07, -1.0
    for index in sorted(range(len(series)), key=lambda index: shares[index]):
        label, last = series[index].label, float(np.nanmax(series[index].x))
        text = label if len(label) <= LABEL_CHARS else label[: LABEL_CHARS - 1] + "…"
        if last < 0.85 * end:
            place: dict[str, Any] = {"xytext": (4, 4), "textcoords": "offset points"}
            axes.annotate(
                text, (last, heights[index]), color=series[index].color, fontsize=8, parse_math=False, **place
            )
            continue
        taken = max(shares[index], taken + gap, 0.0)
        axes.text(
            1.01,
            taken,
            text,
            transform=axes.transAxes,
            color=series[index].color,
            fontsize=8,
            va="center",
            parse_math=False,
        )
