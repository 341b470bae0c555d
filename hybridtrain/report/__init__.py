"""`hybridtrain report`: a run, or several over one another, as one self-contained page and as PNGs. Works while a run goes on, and after it failed.

run directory --history--> columns, events, config --plots, ranks--> figures --> <run>/report/*.png
                                                                         \\--svg, page--> <run>/report/index.html
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

from hybridtrain.config.schema import ReportRoot
from hybridtrain.files import write_atomically
from hybridtrain.report import compare, plots, ranks, single
from hybridtrain.report.history import History, read
from hybridtrain.types import refusal

COMPARISON = Path("runs/compare")
DPI = 180


def run(config: ReportRoot) -> int:
    """Draw the run in run.dir, or compare those in report.compare; print the numbers and the files. Raises UserError if there is no run."""
    if config.report.compare:
        histories = [read(Path(folder)) for folder in config.report.compare]
        drawn = list(plots.of_runs(histories, names=compare.names(histories)))
        name, text, document, default = "", compare.lines(histories), compare.document(histories, drawn), COMPARISON
    else:
        history = read(Path(config.run.dir))
        drawn = of_run(history)
        name, text, document, default = history.name, single.lines(history), single.document(history, drawn), history.folder / "report"
    files = write(drawn, document, name=name, out=Path(config.report.out) if config.report.out else default)
    print(text + "\n\n" + "\n".join(str(file) for file in files))
    return 0


def of_run(history: History) -> list[plots.Plot]:
    """All plots of one run, the layout last."""
    layout = ranks.layout_of(history.summary)
    return [*plots.of_run(history), *([ranks.plot(layout, hosts=history.summary.get("machine") or ())] if layout else [])]


def write(drawn: Sequence[plots.Plot], document: str, *, name: str, out: Path) -> list[Path]:
    """Write index.html and the PNGs (with the run's `name` in a corner) into `out`, each whole or not at all; returns the files.

    What an earlier report drew there and this one did not is removed.
    """
    pictures = {out / f"{plot.name}.png": plot for plot in drawn}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path, plot in pictures.items():
            stream = io.BytesIO()
            plot.figure.text(0.985, 0.975, name, ha="right", va="top", fontsize=8, color=plots.MUTED)
            with mpl.rc_context(plots.STYLE):
                plot.figure.savefig(stream, format="png", dpi=DPI)
            write_atomically(path, stream.getvalue())
        write_atomically(out / "index.html", document)
        for old in {out / f"{name}.png" for name in plots.NAMES} - set(pictures):
            old.unlink(missing_ok=True)
    except OSError as error:
        raise refusal("report.out", out, f"it cannot be written: {error}", allowed="a folder that you can write", instead="report.out=FOLDER") from error
    return [out / "index.html", *pictures]
