"""The HTML page: one file, no requests to other servers. All text of a run is escaped."""

from __future__ import annotations

import html
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridtrain.report.plots import AXES, MAPS, Plot
from hybridtrain.report.svg import inline

FOLDER = Path(__file__).resolve().parent
LONG = 9  # characters that fit into a tile at full size
SIGNATURE = " by hybridtrain report."
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def document(title: str, body: Iterable[str]) -> str:
    """The whole page around `body`. Its content security policy forbids the browser to load anything."""
    style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    written = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
    ]
    lines += [
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{style}</style></head>",
    ]
    lines += [
        "<body><main>",
        *body,
        f'<p class="note">Drawn {written}{SIGNATURE}</p>',
        f"</main><script>{script}</script></body></html>",
    ]
    return "\n".join(lines) + "\n"


def escape(value: object) -> str:
    return html.escape(str(value), quote=True)


def header(name: str, *, status: str, about: str) -> str:
    pill = f'<span class="status {escape(status)}">{escape(status)}</span>' if status else ""
    return f'<header><h1>{escape(name)}</h1>{pill}<p class="about">{escape(about)}</p></header>'


def tiles(values: Mapping[str, tuple[str, str]]) -> str:
    """Tiles from name -> (value, text below it); those without a value are left out."""
    items = [
        f'<div class="tile"><dt>{escape(name)}</dt><dd{" class=long" if len(value) > LONG else ""}>'
        f"{escape(value)}<small>{escape(below)}</small></dd></div>"
        for name, (value, below) in values.items()
        if value
    ]
    return f'<dl class="tiles">{"".join(items)}</dl>'


def plots(drawn: Sequence[Plot]) -> str:
    """The plots in a grid.

    Plots that differ only in their x axis, and heat maps, share a place, with tabs that need no script.
    """
    families: dict[str, list[Plot]] = {}
    for plot in drawn:
        families.setdefault(_tab(plot)[0], []).append(plot)
    return f'<div class="plots">{"".join(_figure(name, members) for name, members in families.items())}</div>'


def _tab(plot: Plot) -> tuple[str, str]:
    """(name of the place, of the tab) of a plot."""
    if plot.name in MAPS:
        return next(iter(MAPS)), MAPS[plot.name]
    for axis in AXES:
        if plot.name.endswith(f"_{axis.name}"):
            return plot.name.removesuffix(f"_{axis.name}"), axis.name
    return plot.name, AXES[0].name


def _figure(name: str, members: Sequence[Plot]) -> str:
    pictures = [inline(plot) for plot in members]
    if len(members) == 1:
        return f'<figure id="{name}">{pictures[0]}</figure>'
    words = [_tab(plot)[1] for plot in members]
    inputs = "".join(
        f'<input type="radio" name="{name}" id="{name}-{word}"{" checked" if n == 0 else ""}>'
        for n, word in enumerate(words)
    )
    bar = "".join(f'<label for="{name}-{word}">{word}</label>' for word in words)
    panes = "".join(f'<div class="pane">{picture}</div>' for picture in pictures)
    return f'<figure id="{name}" class="tabs">{inputs}<div class="bar">{bar}</div>{panes}</figure>'


def section(title: str, content: str) -> str:
    return (
        f'<section id="{escape(title.split()[0].lower())}"><h2>{escape(title)}</h2>{content}</section>'
        if content
        else ""
    )


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], *, numbers: Sequence[int]) -> str:
    """A table in a card; empty without rows. `numbers`: columns of numbers, which do not wrap.

    Markup cells are not escaped.
    """
    if not rows:
        return ""
    top = f"<thead><tr>{''.join(f'<th>{_cell(text)}</th>' for text in head)}</tr></thead>" if head else ""
    body = "".join(
        f"<tr>{''.join(_column(text, index, numbers) for index, text in enumerate(row))}</tr>" for row in rows
    )
    return f'<div class="card"><table>{top}<tbody>{body}</tbody></table></div>'


class Markup(str):
    """Text that is HTML and need not be escaped."""


def _cell(value: Any) -> str:
    return value if isinstance(value, Markup) else escape("" if value is None else value)


def _column(value: Any, index: int, numbers: Sequence[int]) -> str:
    return (
        f'<th scope="row">{_cell(value)}</th>'
        if index == 0
        else f'<td class="{"n" if index in numbers else "wide"}">{_cell(value)}</td>'
    )


def options(config: Mapping[str, Mapping[str, Any]], *, defaults: Mapping[str, Mapping[str, Any]]) -> str:
    """Two boxes: the options that differ from the defaults; and all options by section,
    collapsed, with changes marked.
    """
    changed = {
        (name, key)
        for name, values in config.items()
        for key, value in values.items()
        if value != defaults.get(name, {}).get(key)
    }
    changed_rows = [
        _option(f"{name}.{key}", value, marked=False)
        for name, values in config.items()
        for key, value in values.items()
        if (name, key) in changed
    ]
    sections = []
    for name, values in config.items():
        count = sum((name, key) in changed for key in values)
        rows = "".join(_option(key, value, marked=(name, key) in changed) for key, value in values.items())
        words = f"{count} of {len(values)} changed" if count else "defaults"
        sections.append(
            f"<details><summary>{escape(name)} <small>{words}</small></summary>"
            f'<table class="code">{rows}</table></details>'
        )
    first = (
        f'<div class="card"><table class="code">{"".join(changed_rows)}</table></div>' if changed_rows else ""
    )
    return (
        f'<p class="note">Changed from the defaults:</p>{first}'
        f'<p class="note">All options:</p><div class="card columns">{"".join(sections)}</div>'
    )


def _option(name: str, value: Any, *, marked: bool) -> str:
    shown = "''" if value == "" else str(value)
    return (
        f'<tr{" class=changed" if marked else ""}><th scope="row">{escape(name)}</th>'
        f'<td class="wide">{escape(shown)}</td></tr>'
    )
