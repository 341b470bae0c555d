"""The page of `hybridtrain compare`, beside its JSON file: the table, and plots of what models cost.

KL, perplexity    against the bytes of the weights, both on log scales; a line through the models that no
                  other beats in both
errors            of the outputs of each linear layer, layer x scheme
speed             tokens a second, as a multiple of the reference
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hybridtrain.errors import refusal
from hybridtrain.report import compared, page
from hybridtrain.report.heat_map import of_rows
from hybridtrain.report.plots import COLORS, MUTED, STYLE, Plot
from hybridtrain.runtime.files import unwritable, write_atomically

FIELD = "compare.out"
Row = Mapping[str, Any]
Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""(head, rows)."""
_LABEL = 26


def check(file: Path) -> None:
    """Refuse to replace a file that is no such page (raises UserError)."""
    try:
        ours = not file.exists() or page.SIGNATURE in file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise unwritable(FIELD, file, error) from error
    if not ours:
        problem = "it is no page of hybridtrain, and would be replaced"
        raise refusal(FIELD, file, problem, allowed="another name", instead=f"{FIELD}=FOLDER/compare.json")


def write(result: Mapping[str, Any], file: Path, *, costs: Table, scores: Table) -> None:
    """Draw the page of a comparison (compare.json), with its tables of memory and speed, and of scores."""
    rows = result["candidates"]
    drawn = [*tradeoffs(rows), *_errors(rows), *_speed(rows)]
    body = [
        page.header(
            f"{len(rows)} compared with {result['reference']['name']}", status="", about=_about(result)
        ),
        compared.section(compared.cells(result)),
        page.section("What it costs", page.plots(drawn) if drawn else ""),
        page.section("Memory and speed", page.table(*costs, numbers=range(1, len(costs[0]) - 1))),
        page.section("Benchmarks", page.table(*scores, numbers=(3,))),
    ]
    try:
        write_atomically(file, page.document(f"Compared with {result['reference']['name']}", body))
    except OSError as error:
        raise unwritable(FIELD, file, error) from error


def _about(result: Mapping[str, Any]) -> str:
    return (
        f"{result['rows']} held-out rows x {result['seq_len']} of {result['data']}, "
        f"{result['reference']['tokens']:,} tokens; ± standard errors over rows"
    )


def tradeoffs(rows: Sequence[Row]) -> Iterator[Plot]:
    """What is lost against the bytes of the weights. One without a value above 0 is left out."""
    for name, key, title, unit in (
        ("kl", "kl", "Divergence by size", "KL from the reference, nats a token"),
        ("change", "loss_change", "Perplexity by size", "change of the perplexity, %"),
    ):
        factor = 100 if key == "loss_change" else 1
        points = [
            (
                str(each["name"]),
                each["bytes"] / 1e6,
                factor * each[key]["mean"],
                factor * (each[key]["error"] or 0),
            )
            for each in rows
            if math.isfinite(each[key]["mean"])
        ]
        if any(y > 0 for _, _, y, _ in points):
            yield _tradeoff(name, title, unit, points)


def _tradeoff(name: str, title: str, unit: str, points: Sequence[tuple[str, float, float, float]]) -> Plot:
    """Points (name, MB, value, error); those without a value above 0 lie on the lower edge."""
    above = [y for _, _, y, _ in points if y > 0]
    low = min(above) / 3
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.8, 3.9))
        axes = figure.add_subplot()
        axes.set_title(title)
        edge = "; triangles: not above 0" if len(above) < len(points) else ""
        axes.set_xlabel(f"MB of weights, as stored{edge}")
        axes.set_ylabel(unit)
        axes.set_xscale("log")
        axes.set_yscale("log")
        places = [(label, x, y if y > 0 else low) for label, x, y, _ in points]
        front = pareto([(x, y) for _, x, y in places])
        line = sorted((places[index][1], places[index][2]) for index in front)
        axes.plot(*zip(*line, strict=True), color=MUTED, linewidth=1, drawstyle="steps-post", zorder=1)
        for index, (label, x, y) in enumerate(places):
            color = COLORS[0] if index in front else COLORS[1]
            _, _, value, error = points[index]
            marker = "o" if value > 0 else "v"
            axes.plot([x], [y], marker, color=color, markersize=5, gid=f"tip:{index}:{label}: {value:.3g}")
            if value > 0 and error:
                axes.plot([x, x], [max(y - error, low), y + error], color=color, linewidth=0.8)
            axes.annotate(
                _short(label),
                (x, y),
                xytext=(-5, -9) if index in front else (5, 3),
                textcoords="offset points",
                ha="right" if index in front else "left",
                fontsize=7,
                color=color,
                parse_math=False,
            )
        axes.set_ylim(low / 2, 4 * max(above))
        _plain_sizes(axes, [x for _, x, _ in places])
        return Plot(name, f"{title}: {len(points)} models, {len(front)} on the front", figure)


def _plain_sizes(axes: Axes, sizes: Sequence[float]) -> None:
    """A few sizes in MB as ticks, in place of powers of ten, and room for names on both sides."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    first, last = min(sizes), max(sizes)
    room = 1.3 * (last / first) ** 0.25
    axes.set_xlim(first / room, last * room)
    axes.xaxis.set_major_locator(FixedLocator(np.geomspace(first, max(last, 1.01 * first), 4).tolist()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def pareto(points: Sequence[tuple[float, float]]) -> set[int]:
    """Which points no other beats: none is as small in both, and smaller in one."""
    return {
        index
        for index, (x, y) in enumerate(points)
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
    }


def _short(label: str) -> str:
    """The end of a path, or a name."""
    text = label if len(label) <= _LABEL else Path(label).name
    return text if len(text) <= _LABEL else text[: _LABEL - 1] + "…"


def _errors(rows: Sequence[Row]) -> Iterator[Plot]:
    """Mean square errors of the layers' outputs, relative to their mean square."""
    having = [each for each in rows if each["output_errors"]]
    if not having:
        return
    modules = tuple(having[0]["output_errors"])
    values = np.array([[each["output_errors"].get(name, np.nan) for each in having] for name in modules])
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log10(np.where(values > 0, values, np.nan))
    if np.isnan(logs).all():
        return
    low, high = np.nanmin(logs), np.nanmax(logs)
    names = [_short(str(each["name"])) for each in having]
    tips = [
        ", ".join(f"{name} {value:.1e}" for name, value in zip(names, row, strict=True)) for row in values
    ]
    yield of_rows(
        "errors",
        "Errors of outputs by layer",
        0.06 + 0.94 * (logs - low) / max(high - low, 1e-9),
        broken=~np.isfinite(values),
        rows=modules,
        columns=dict(enumerate(names)),
        below=f"mean square, of that of the outputs: from {10**low:.0e}, pale, to {10**high:.0e}",
        tips=tips,
    )


def _speed(rows: Sequence[Row]) -> Iterator[Plot]:
    """Tokens a second by those of the reference in the same rounds, with the slowest and fastest round."""
    timed = [each for each in rows if each.get("speed")]
    passes = list(dict.fromkeys(name for each in timed for name in each["speed"]))
    if not timed:
        return
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.8, max(2.0, 1.1 + 0.32 * len(timed) * len(passes))))
        axes = figure.add_subplot()
        axes.set_title("Speed")
        axes.set_xlabel("tokens a second, by those of the reference in the same rounds")
        axes.grid(visible=False, axis="y")
        height = 0.8 / len(passes)
        for number, name in enumerate(passes):
            found = [
                (place, each["speed"][name]) for place, each in enumerate(timed) if name in each["speed"]
            ]
            at = [place + (number - (len(passes) - 1) / 2) * height for place, _ in found]
            ratios = [figure_["ratio"] for _, figure_ in found]
            spread = [
                [max(0.0, each["ratio"] - each["ratio_least"]) for _, each in found],
                [max(0.0, each["ratio_most"] - each["ratio"]) for _, each in found],
            ]
            axes.barh(at, ratios, 0.9 * height, xerr=spread, color=COLORS[number], ecolor=MUTED, label=name)
        axes.axvline(1, color=MUTED, linewidth=1)
        axes.set_yticks(range(len(timed)), [_short(str(each["name"])) for each in timed], parse_math=False)
        axes.invert_yaxis()
        axes.legend(loc="lower right", bbox_to_anchor=(1, 0.99), ncols=len(passes))
        yield Plot("speed", f"Speed of {len(timed)} models", figure)
