"""A matplotlib figure as inline SVG: colors become CSS variables (light and dark), and a script
can read the curves.
"""

from __future__ import annotations

import html
import io
import json
import re

import matplotlib as mpl
from matplotlib.figure import Figure

from hybridtrain.report.plots import ALARM, COLORS, GRID, INK, MUTED, PAPER, STYLE, Plot

VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    PAPER: "paper",
    ALARM: "alarm",
    **{color: f"c{n}" for n, color in enumerate(COLORS)},
}
_COLOR = re.compile("|".join(VARIABLES))
_SERIES = re.compile(r'<g id="series:([^"]*)">')
_TIP = re.compile(r'<g id="tip:\d+:([^"]*)">')
_NUMBER = re.compile(r"(\d\.\d{2})\d+")
_IDS = re.compile(
    r'<g id="(?:figure|axes|patch|line2d|text|matplotlib\.axis|xtick|ytick|legend'
    r'|LineCollection|PathCollection)_\d+">'
)


def inline(plot: Plot) -> str:
    """The plot as an <svg> element, with its title for screen readers."""
    stream = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": plot.name}):  # for ids that are unique on the page
        plot.figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = _IDS.sub("<g>", text)
    text = _SERIES.sub(r'<g data-series="\1">', text)
    text = _TIP.sub(r"<g><title>\1</title>", text)
    text = _NUMBER.sub(r"\1", text)
    text = _COLOR.sub(lambda match: f"var(--{VARIABLES[match[0]]})", text)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", text)
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None
    head = f'<svg {view[0]} role="img" aria-label="{html.escape(plot.title)}" {_scales(plot.figure)}xmlns:xlink="http://www.w3.org/1999/xlink">'
    return re.sub(r"\n\s*", "\n", head + text[text.index(">") + 1 :])


def _scales(figure: Figure) -> str:
    """Position and range of the axes, for the script that shows values; empty for a plot without curves."""
    axes = figure.axes[0]
    if not axes.axison:
        return ""
    width, height = (72 * inches for inches in figure.get_size_inches())
    bounds = axes.get_position()
    scales = {
        "box": [
            round(value, 2)
            for value in (
                bounds.x0 * width,
                (1 - bounds.y1) * height,
                bounds.x1 * width,
                (1 - bounds.y0) * height,
            )
        ],
        "x": axes.get_xlim(),
        "y": axes.get_ylim(),
        "log": axes.get_yscale() == "log",
        "xlabel": axes.get_xlabel(),
    }
    return f"data-scales='{html.escape(json.dumps(scales), quote=True)}' "
