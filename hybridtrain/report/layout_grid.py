"""A plot of the layout: the grid of ranks, with the host of each.

One block per pipeline stage; in it the tp ranks of a data rank side by side, and data ranks in reading order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from hybridtrain.plan.layout import AXES, ParallelLayout
from hybridtrain.plan.notation import parse
from hybridtrain.report.plots import COLORS, INK, MUTED, STYLE, Plot

MOST_CELLS = 1024
MOST_OF_ONE_REPLICA = 16384  # ranks; no run has more, and as many cells would take minutes
NUMBERS_UP_TO = 256  # with more ranks, cells are too small for the rank number
BETWEEN = 0.9  # distance between two stages in cells, for title and frame


def layout_of(summary: Mapping[str, Any]) -> ParallelLayout | None:
    """The layout in summary.json; None if it is missing or cannot be drawn."""
    try:
        degrees = {"dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1, "pp": 1} | {
            key: n for key, n in parse(str(summary["layout"])).items() if key in AXES
        }
        layout = ParallelLayout(**degrees)
    except (KeyError, ValueError, TypeError):
        return None
    return (
        layout
        if min(degrees.values()) >= 1 and layout.pp * layout.cp * layout.tp <= MOST_OF_ONE_REPLICA
        else None
    )


def plot(layout: ParallelLayout, *, hosts: Sequence[Mapping[str, Any]]) -> Plot:
    """Draw `layout`, with the cells colored by host. `hosts`: machine.json."""
    group = layout.cp * layout.tp
    shown = min(layout.dp, max(1, MOST_CELLS // (layout.pp * group)))
    columns = _columns(groups=shown, width=group, stages=layout.pp)
    rows = math.ceil(shown / columns)
    gap = 0.5 if group > 1 else 0.0
    wide, high = columns * (group + gap) - gap, float(rows)
    across = _blocks_across(layout.pp, wide=wide, high=high)
    down = math.ceil(layout.pp / across)
    width, height = across * (wide + BETWEEN) - BETWEEN, down * (high + 2 * BETWEEN) - BETWEEN
    host_of = {rank: index for index, host in enumerate(hosts) for rank in host.get("ranks", ())}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.8, min(8.0, max(1.6, 0.6 + 5.8 * height / max(width, 8.0)))))
        axes = figure.add_subplot()
        axes.set_axis_off()
        axes.set_aspect("equal")
        for stage in range(layout.pp):
            left, top = (stage % across) * (wide + BETWEEN), (stage // across) * (high + 2 * BETWEEN)
            _frame(axes, left, top, wide, high, words=f"stage {stage}" if layout.pp > 1 else "")
            for data in range(shown):
                row, column = divmod(data, columns)
                for inner in range(group):
                    rank = (stage * layout.dp + data) * group + inner
                    _cell(
                        axes,
                        left + column * (group + gap) + inner,
                        top + row,
                        rank=rank,
                        layout=layout,
                        host_of=host_of,
                        hosts=hosts,
                    )
        centre = max(0.0, (8.0 - width) / 2)
        axes.set_xlim(-0.4 - centre, width + 0.4 + centre)
        axes.set_ylim(height + 0.3, -BETWEEN - 0.2)
        title, below = _words(layout, shown=shown, hosts=len(hosts))
        figure.suptitle(title, x=0.02, ha="left", fontsize=STYLE["axes.titlesize"], fontweight="bold")
        axes.text(0.02, 0.01, below, transform=figure.transFigure, fontsize=7.5, color=MUTED, va="bottom")
        return Plot("layout", f"Layout of {layout.world_size} ranks", figure)


def _columns(*, groups: int, width: int, stages: int) -> int:
    """Columns of data ranks per stage, so that all stages side by side have an aspect ratio of
    about two to one.
    """
    best = math.sqrt(2.0 * groups / (width * min(stages, 8)))
    divisors = [n for n in range(1, groups + 1) if groups % n == 0]
    return min(divisors, key=lambda n: abs(math.log(n / best)))


def _blocks_across(stages: int, *, wide: float, high: float) -> int:
    """Stages per row, so that the whole plot has an aspect ratio of about two to one."""
    divisors = [n for n in range(1, stages + 1) if stages % n == 0]
    return min(
        divisors,
        key=lambda n: abs(
            math.log((n * (wide + BETWEEN)) / (2.0 * math.ceil(stages / n) * (high + 2 * BETWEEN)))
        ),
    )


def _words(layout: ParallelLayout, *, shown: int, hosts: int) -> tuple[str, str]:
    """The title, and the legend below the plot."""
    parts = [f"{axis} {degree}" for axis, degree in layout.axes() if degree > 1]
    title = f"{layout.world_size:,} rank{'s' if layout.world_size > 1 else ''}" + (
        ": " + " x ".join(parts) if parts else ""
    )
    below = (
        ["side by side: tp" + ("; groups: data ranks in reading order" if layout.dp > 1 else "")]
        if layout.tp > 1
        else []
    )
    below += ["data ranks in reading order"] if layout.tp == 1 and layout.dp > 1 else []
    below += (
        [f"data ranks {shown:,} to {layout.dp - 1:,}, not drawn, follow in the same way"]
        if shown < layout.dp
        else []
    )
    below += (
        [f"colors: {hosts} hosts" + (", eight in turn" if hosts > len(COLORS) else "")] if hosts > 1 else []
    )
    return title, "; ".join(below)


def _frame(axes: Axes, left: float, top: float, wide: float, high: float, *, words: str) -> None:
    style: dict[str, Any] = {
        "boxstyle": "round,pad=0,rounding_size=0.15",
        "facecolor": "none",
        "edgecolor": MUTED,
        "linewidth": 0.7,
    }
    axes.add_patch(FancyBboxPatch((left - 0.12, top - 0.12), wide + 0.24, high + 0.24, **style))
    if words:
        axes.text(left - 0.1, top - 0.25, words, fontsize=7.5, color=MUTED, va="bottom")


def _cell(
    axes: Axes,
    x: float,
    y: float,
    *,
    rank: int,
    layout: ParallelLayout,
    host_of: Mapping[int, int],
    hosts: Sequence[Mapping[str, Any]],
) -> None:
    host = host_of.get(rank)
    place = ", ".join(
        f"{axis} {at}" for axis, at in layout.coordinates(rank).items() if dict(layout.axes())[axis] > 1
    )
    tip = (
        f"rank {rank}"
        + (f": {place}" if place else "")
        + (f"; {hosts[host].get('host')}" if host is not None else "")
    )
    color = COLORS[(host or 0) % len(COLORS)]
    axes.add_patch(
        Rectangle(
            (x + 0.05, y + 0.05),
            0.9,
            0.9,
            facecolor=color,
            alpha=0.22,
            edgecolor="none",
            gid=f"tip:{rank}:{tip}",
        )
    )
    if layout.world_size <= NUMBERS_UP_TO:
        axes.text(
            x + 0.5, y + 0.5, str(rank), ha="center", va="center_baseline", fontsize=_font(layout), color=INK
        )


def _font(layout: ParallelLayout) -> float:
    return 10 if layout.world_size <= 16 else 8 if layout.world_size <= 64 else 4.5
