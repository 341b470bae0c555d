"""`hybridtrain report`: one run, or several plotted together, as a self-contained HTML page and PNGs;
also of running runs.

run directory --history--> columns, events, config
    --plots, ranks--> figures --> <run>/report/*.png
                          \\--svg, page--> <run>/report/index.html
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

from hybridtrain.config.schema import ReportRoot
from hybridtrain.report import compare, heat_map, layout_grid, page, plots, single
from hybridtrain.report.history import History, read
from hybridtrain.runtime.files import (
    check_replaceable,
    discard,
    read_record,
    unwritable,
    write_atomically,
    write_record,
)

COMPARISONS = Path("runs/compare")
RECORD = ".hybridtrain-report.json"
"""Record of the files in a folder that a report wrote and may replace."""
DPI = 180
_PAGE = "index.html"
_NAMES = (_PAGE, *(f"{name}.png" for name in plots.NAMES))


def run(config: ReportRoot) -> int:
    """Report on run.dir, or compare the runs in report.compare; print the numbers and the files.

    Raises UserError.
    """
    if config.report.compare:
        histories = [read(Path(folder)) for folder in config.report.compare]
        drawn = list(plots.of_runs(histories, names=compare.names(histories)))
        name, text, document, default = (
            "",
            compare.lines(histories),
            compare.document(histories, drawn),
            comparison_folder(histories),
        )
    else:
        history = read(Path(config.run.dir))
        drawn = of_run(history)
        name, text, document, default = (
            history.name,
            single.lines(history),
            single.document(history, drawn),
            history.folder / "report",
        )
    files = write(drawn, document, name=name, out=Path(config.report.out) if config.report.out else default)
    print(text + "\n\n" + "\n".join(str(file) for file in files))
    return 0


def comparison_folder(histories: Sequence[History]) -> Path:
    """Default folder for a comparison of these runs, the same one if the same runs are compared again."""
    run_names = [
        re.sub(r"[^\w.=-]+", "-", name).strip(".-")[:40] or "run" for name in compare.names(histories)
    ]
    words = "+".join(run_names[:2] if len(run_names) <= 2 else [run_names[0], f"{len(run_names) - 1}-others"])
    which = "\n".join(str(history.folder.resolve()) for history in histories)
    return COMPARISONS / f"{words}-{hashlib.sha256(which.encode(errors='surrogatepass')).hexdigest()[:6]}"


def of_run(history: History) -> list[plots.Plot]:
    """All plots of one run, the layout last."""
    layout = layout_grid.layout_of(history.summary)
    return [
        *plots.of_run(history),
        *(heat_map.plots(history.numerics) if history.numerics else ()),
        *([layout_grid.plot(layout, hosts=history.hosts)] if layout else []),
    ]


def write(drawn: Sequence[plots.Plot], document: str, *, name: str, out: Path) -> list[Path]:
    """Write index.html and the PNGs (with the run's `name` in a corner) atomically into
    `out`; returns the files.

    Files of an earlier report are replaced, or removed if this report has no such plot; other files of these
    names are refused (UserError).
    """
    pictures = {out / f"{plot.name}.png": plot for plot in drawn}
    files = [out / _PAGE, *pictures]
    try:
        before = read_record(out, record=RECORD)
        if not before and _is_older_report(out):
            before = {name for name in _NAMES if (out / name).is_file()}
            write_record(out, before, record=RECORD)
        check_replaceable(out, [file.name for file in files], record=RECORD, field="report.out")
        out.mkdir(parents=True, exist_ok=True)
        write_record(out, before.union(file.name for file in files), record=RECORD)
        for path, plot in pictures.items():
            stream = io.BytesIO()
            plot.figure.text(
                0.985, 0.975, name, ha="right", va="top", fontsize=8, color=plots.MUTED, parse_math=False
            )
            with mpl.rc_context(plots.STYLE):
                plot.figure.savefig(stream, format="png", dpi=DPI)
            write_atomically(path, stream.getvalue())
        write_atomically(out / _PAGE, document)
        remaining = {
            old
            for old in before.intersection(_NAMES) - {file.name for file in files}
            if not discard(out / old)
        }
        write_record(out, remaining.union(file.name for file in files), record=RECORD)
    except OSError as error:
        raise unwritable("report.out", out, error) from error
    return files


def _is_older_report(folder: Path) -> bool:
    """Whether an earlier version, which wrote no record, wrote the page in `folder`."""
    try:
        return page.SIGNATURE in (folder / _PAGE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
