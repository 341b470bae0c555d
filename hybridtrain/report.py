"""`hybridtrain report`: the curves of a run as PNGs, and its numbers as a small table. Works while the run goes on.

<run>/metrics.jsonl, summary.json, config.yaml  ->  <run>/report/{loss,grad_norm,lr,throughput,memory,loss_scale}.png
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from hybridtrain.config import compose
from hybridtrain.config.schema import ReportRoot
from hybridtrain.metrics import duration, quantity
from hybridtrain.types import refusal

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
BLUE, ORANGE = "#2f6fde", "#e8710a"

STYLE: dict[Any, Any] = {
    "figure.figsize": (8.0, 4.5),
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 12,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "lines.linewidth": 1.8,
    "lines.solid_joinstyle": "round",
    "legend.frameon": False,
}
SMOOTH_FROM = 60  # so many points or more are drawn pale, with a running mean on top


@dataclass(frozen=True)
class History:
    """What a run directory says about its run."""

    folder: Path
    name: str
    rows: list[dict[str, Any]]
    """Lines of metrics.jsonl in the order of their steps."""
    summary: Mapping[str, Any]
    """summary.json; empty if there is none."""
    steps: int
    """Steps that the config asks for; 0 if its end is not given in steps."""

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values, float64, of the rows that have `key`; null is NaN, which leaves a gap in a curve."""
        points = [(row["step"], math.nan if row[key] is None else row[key]) for row in self.rows if key in row]
        steps, values = np.array(points, dtype=float).reshape(-1, 2).T
        return steps, values

    def known(self, key: str) -> list[float]:
        """The values of `key` that are not null."""
        return [row[key] for row in self.rows if row.get(key) is not None]


def run(config: ReportRoot) -> int:
    """Draw the run in run.dir and print its table; raises UserError if there is nothing to draw."""
    history = read(Path(config.run.dir))
    pictures = draw(history, out=Path(config.report.out) if config.report.out else history.folder / "report")
    print(table(history))
    print("\n" + "\n".join(str(picture) for picture in pictures))
    return 0


def read(folder: Path) -> History:
    """Read a run directory; a last line that is still being written is left out. Raises UserError for a missing or empty run."""
    path = folder / "metrics.jsonl"
    if not folder.is_dir() or not path.is_file():
        problem = f"there is no {path.name} in it" if folder.is_dir() else "there is no such folder"
        raise refusal("run.dir", folder, problem, allowed="the folder of a run", instead=_runs_near(folder))
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    if not rows:
        raise refusal("run.dir", folder, "no step was logged yet", allowed="a run with a logged step", instead="the same command when the run has logged one")
    summary_path, config_path = folder / "summary.json", folder / "config.yaml"
    summary = json.loads(summary_path.read_text(encoding="utf-8")) if summary_path.is_file() else {}
    config = compose.from_yaml(config_path, "train") if config_path.is_file() else None
    return History(
        folder=folder,
        name=config.run.name if config and config.run.name else folder.resolve().name,
        rows=sorted(rows, key=lambda row: row["step"]),
        summary=summary,
        steps=config.train.steps if config else 0,
    )


def _runs_near(folder: Path) -> str:
    """A folder of a run beside `folder`, the one that was written to last, as a suggestion."""
    found = sorted(folder.parent.glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime) if folder.parent.is_dir() else []
    return f"hybridtrain report {found[-1].parent}" if found else "hybridtrain report runs/<name>"


def table(history: History) -> str:
    """The run's numbers, one per line; what is not known is left out."""
    rows, summary = history.rows, history.summary
    losses, speeds = history.known("loss"), history.known("tokens_per_s")
    evaluations = [row for row in rows if row.get("eval_loss") is not None]
    times = history.known("time")
    wall_s = summary.get("wall_s") or (times[-1] - times[0] if times else None)
    speed = summary.get("tokens_per_s") or (float(np.median(speeds)) if speeds else None)
    last = rows[-1]
    lines = {
        "status": " ".join(filter(None, [str(summary.get("status", "unknown")), f"({summary['exit_reason']})" if summary.get("exit_reason") else ""])),
        "layout": f"{summary['layout']}, {summary['world_size']} processes" if summary.get("layout") and summary.get("world_size") else None,
        "steps": f"{last['step']}" + (f" of {history.steps}" if history.steps else ""),
        "tokens": quantity(last["tokens_seen"]) if last.get("tokens_seen") is not None else None,
        "loss": f"{losses[0]:.4f} at the start, {losses[-1]:.4f} at the end" if losses else "never finite",
        "eval loss": f"{evaluations[-1]['eval_loss']:.4f} at step {evaluations[-1]['step']}" if evaluations else None,
        "tokens/s": quantity(speed) if speed is not None else None,
        "wall time": duration(wall_s) if wall_s is not None else None,
    }
    return "\n".join([f"run         {history.folder}", *(f"{name:<12}{value}" for name, value in lines.items() if value is not None)])


def draw(history: History, *, out: Path) -> list[Path]:
    """Write the PNGs into `out` and return their paths. A curve without a single value is left out, and what an earlier call drew of it removed."""
    out.mkdir(parents=True, exist_ok=True)
    figures = {"loss": _loss, "grad_norm": _grad_norm, "lr": _lr, "throughput": _throughput, "memory": _memory, "loss_scale": _loss_scale}
    written = []
    with mpl.rc_context(STYLE):
        for name, plot in figures.items():
            path = out / f"{name}.png"
            figure = Figure()
            axes = figure.add_subplot()
            if plot(history, axes):
                _finish_axes(history, axes)
                figure.savefig(path, dpi=150)
                written.append(path)
            else:
                path.unlink(missing_ok=True)
    return written


def _finish_axes(history: History, axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlim(0, 1.01 * history.rows[-1]["step"])
    axes.set_title(history.name, loc="right", color=MUTED, fontsize=11, fontweight="normal")


def _curve(history: History, axes: Axes, key: str, *, smooth: bool, **style: Any) -> bool:
    """Draw one series; with `smooth`, a long one is pale with its running mean on top. False if it has no value."""
    steps, values = history.series(key)
    known = np.isfinite(values)
    if smooth and known.sum() >= SMOOTH_FROM:
        axes.plot(steps, values, color=BLUE, alpha=0.25, linewidth=1.0)
        axes.plot(steps[known], _running_mean(values[known]), color=BLUE, **style)
    elif known.any():
        # A line through one or two points is easily missed.
        axes.plot(steps, values, color=BLUE, marker="o" if known.sum() < 3 else None, **style)
    return bool(known.any())


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a 30th of the points around each. Near the start symmetric, so that a falling curve is not bent; near the end what there is."""
    half = max(1, len(values) // 60)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    centre = np.arange(len(values))
    reach = np.minimum(half, centre)
    first, end = centre - reach, np.minimum(centre + reach + 1, len(values))
    return (sums[end] - sums[first]) / (end - first)


def _loss(history: History, axes: Axes) -> bool:
    drawn = _curve(history, axes, "loss", smooth=True, label="train")
    steps, values = history.series("eval_loss")
    if np.isfinite(values).any():
        axes.plot(steps, values, color=ORANGE, marker="o", markersize=5, markeredgecolor="white", label="held out")
        axes.legend(loc="upper right")
        drawn = True
    axes.set_title("Loss")
    axes.set_ylabel("nats per token")
    last = history.rows[-1]
    if drawn and last.get("tokens_seen") and last["step"]:
        per_step = last["tokens_seen"] / last["step"]
        tokens = axes.secondary_xaxis("top", functions=(lambda step: step * per_step, lambda token: token / per_step))
        tokens.set_xlabel("tokens", labelpad=6)
        tokens.xaxis.set_major_formatter(EngFormatter(sep=""))
        tokens.spines["top"].set_visible(True)
    return drawn


def _grad_norm(history: History, axes: Axes) -> bool:
    axes.set_title("Gradient norm")
    axes.set_ylabel("L2 norm before clipping")
    drawn = _curve(history, axes, "grad_norm", smooth=True)
    known = history.known("grad_norm")
    if drawn and min(known) > 0 and max(known) > 30 * float(np.median(known)):
        axes.set_yscale("log")
    elif drawn:
        axes.set_ylim(bottom=0)
    return drawn


def _lr(history: History, axes: Axes) -> bool:
    axes.set_title("Learning rate")
    axes.set_ylabel("learning rate")
    if not _curve(history, axes, "lr", smooth=False):
        return False
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _scientific(value)))
    return True


def _scientific(value: float) -> str:
    """1.75e-3 for 0.00175; 0 for 0."""
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


def _throughput(history: History, axes: Axes) -> bool:
    axes.set_title("Throughput")
    axes.set_ylabel("tokens per second")
    if not _curve(history, axes, "tokens_per_s", smooth=True):
        return False
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    known = history.known("mfu")
    if known:
        axes.set_title(f"Throughput (MFU {float(np.median(known)):.1%})")
    return True


def _memory(history: History, axes: Axes) -> bool:
    axes.set_title("Peak memory")
    axes.set_ylabel("GiB, largest over ranks")
    if not _curve(history, axes, "max_memory_gib", smooth=False, drawstyle="steps-post"):
        return False
    axes.set_ylim(bottom=0, top=1.1 * max(history.known("max_memory_gib")))
    return True


def _loss_scale(history: History, axes: Axes) -> bool:
    """Only when it varies: without fp16 it is 1 throughout."""
    axes.set_title("Loss scale")
    axes.set_ylabel("loss scale")
    if len(set(history.known("loss_scale"))) < 2:
        return False
    _curve(history, axes, "loss_scale", smooth=False, drawstyle="steps-post")
    axes.set_yscale("log", base=2)
    return True
