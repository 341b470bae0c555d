"""The page of several runs: curves in common plots, results side by side, and the options in
which the runs differ.
"""

from __future__ import annotations

from collections.abc import Sequence

from hybridtrain.config import compose
from hybridtrain.report import page, single
from hybridtrain.report.history import History
from hybridtrain.report.plots import COLORS, Plot
from hybridtrain.training.metrics import duration, quantity

_NOT_COMPARED = ("run.dir", "run.name")


def names(histories: Sequence[History]) -> list[str]:
    """Short unique names: the runs' names, else their folders', else the last two parts of their paths."""
    for made in (
        [history.name for history in histories],
        [history.folder.resolve().name for history in histories],
    ):
        if len(set(made)) == len(made):
            return made
    return ["/".join(history.folder.resolve().parts[-2:]) for history in histories]


def differences(histories: Sequence[History]) -> dict[str, list[str]]:
    """Option (also layout, revision, machine) -> its value in each run, if the values differ."""
    columns = []
    for history in histories:
        sections = compose.public(history.config) if history.config else {}
        options = {
            f"{section}.{name}": str(value)
            for section, values in sections.items()
            for name, value in values.items()
        }
        facts = {
            "layout": history.summary.get("layout"),
            "processes": history.summary.get("world_size"),
            "git revision": history.summary.get("git_revision"),
        }
        facts["machine"] = ", ".join(
            sorted({str(host.get("gpu") or host.get("cpu")) for host in history.hosts})
        )
        columns.append({name: "" if value is None else str(value) for name, value in facts.items()} | options)
    keys = list(dict.fromkeys(key for column in columns for key in column if key not in _NOT_COMPARED))
    rows = {key: [column.get(key, "") for column in columns] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def results(histories: Sequence[History]) -> dict[str, list[str]]:
    """Result -> its value in each run."""
    table: dict[str, list[str]] = {}
    for history in histories:
        known = single.tiles(history)
        loss, evaluations, tokens, memory = (
            history.last("loss"),
            history.known("eval_loss"),
            history.last("tokens_seen"),
            known["Peak memory"][0],
        )
        row = {
            "status": history.status,
            "steps": f"{history.step:,}" + (f" of {history.total_steps:,}" if history.total_steps else ""),
            "tokens": quantity(tokens) if tokens is not None else "",
            "final loss": f"{loss:.4f}" if loss is not None else "",
            "held-out loss": f"{evaluations[-1]:.4f}" if len(evaluations) else "",
            "lowest held-out loss": f"{evaluations.min():.4f}" if len(evaluations) else "",
            "tokens/s": quantity(history.tokens_per_s) if history.tokens_per_s is not None else "",
            "MFU": known["MFU"][0],
            "peak memory": memory,
            "training time": duration(history.wall_s) if history.wall_s is not None else "",
        }
        for name, value in row.items():
            table.setdefault(name, []).append(value)
    return {name: values for name, values in table.items() if any(values)}


def document(histories: Sequence[History], plots: Sequence[Plot]) -> str:
    """The whole HTML page."""
    run_names = names(histories)
    head = [
        "",
        *(
            page.Markup(
                f'<span class="swatch" style="background:var(--c{n % len(COLORS)})"></span>'
                f"{page.escape(name)}"
            )
            for n, name in enumerate(run_names)
        ),
    ]
    numbers = range(1, len(run_names) + 1)
    body = [
        page.header(
            f"{len(run_names)} runs compared",
            status="",
            about=" · ".join(str(history.folder) for history in histories),
        ),
        page.table(head, [(name, *values) for name, values in results(histories).items()], numbers=numbers),
        page.section("Curves", page.plots(plots)),
        page.section(
            "Differing options",
            page.table(
                head, [(name, *values) for name, values in differences(histories).items()], numbers=()
            ),
        ),
    ]
    return page.document(" / ".join(run_names), body)


def lines(histories: Sequence[History]) -> str:
    """Results and differing options for the console, a column per run."""
    rows = [
        ["", *names(histories)],
        *([name, *values] for name, values in (results(histories) | differences(histories)).items()),
    ]
    widths = [min(40, max(len(row[column]) for row in rows)) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
