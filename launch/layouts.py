#!/usr/bin/env python3
"""docs/layouts.png: one model trained in one process and under five layouts, their losses over one another.

    python launch/layouts.py PICTURE [key=value ...]        options of all runs, such as train.steps=20

The runs lie in runs/layouts/. One that is finished is not trained again.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

RUNS = Path("runs/layouts")
COMMON = (
    "experiment=smoke",
    "schedule=constant",
    "schedule.warmup_steps=10",
    "optim.lr=1e-3",
    "train.steps=100",
    "train.eval_every=0",
)
SMALLER = ("checkpoint.every=100", "data.seq_len=64", "batch.global_batch_size=8", "batch.micro_batch_size=2")
LAYOUTS = {"single": 1, "ddp": 2, "zero3": 2, "pp2": 2, "zero3_tp2": 4, "tp2_pp2": 4}
"""Files of conf/parallel, and the number of processes that each is trained with."""
COLOURS = dict(zip(LAYOUTS, ("#b8b8b8", "#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677"), strict=True))
CONTROL = "one process, larger micro-batches"
"""How far apart the order of additions alone brings two runs without any parallelism."""


def train(name: str, layout: str, words: tuple[str, ...]) -> list[float]:
    """Train under a layout; the loss of each step."""
    folder = RUNS / name
    start = [
        "hybridtrain",
        "train",
        "--nproc",
        str(LAYOUTS[layout]),
        *COMMON,
        *SMALLER,
        f"parallel={layout}",
        f"run.dir={folder}",
        *words,
    ]
    print(" ".join(start), flush=True)
    subprocess.run(start, check=True)
    return [json.loads(line)["step_loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def apart(values: list[float], plain: list[float]) -> list[float]:
    return [abs(value - one) / one for value, one in zip(values, plain, strict=True)]


def draw(losses: dict[str, list[float]], control: list[float], picture: Path) -> None:
    """Above all losses, the first one widest; below how far each is from that of one process."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    plain = losses["single"]
    steps = range(1, len(plain) + 1)
    for index, (layout, values) in enumerate(losses.items()):
        label = f"parallel={layout}, {LAYOUTS[layout]} process{'es' * (LAYOUTS[layout] > 1)}"
        above.plot(steps, values, color=COLOURS[layout], linewidth=9 - 1.6 * index, label=label)
        if layout != "single":
            below.plot(steps, apart(values, plain), ".", color=COLOURS[layout], markersize=5 + index)
    below.plot(steps, apart(control, plain), "x", color="black", markersize=4, label=CONTROL)
    above.set_ylabel("loss")
    below.set(ylim=(-1e-8, None), xlabel="step", ylabel="relative difference\nfrom parallel=single")
    for axes in (above, below):
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    with io.BytesIO() as large:
        figure.savefig(large, dpi=110)
        Image.open(large).quantize(64).save(picture, optimize=True)


def main(picture: str, *words: str) -> None:
    losses = {layout: train(layout, layout, words) for layout in LAYOUTS}
    control = train("control", "single", ("batch.micro_batch_size=8", *words))
    draw(losses, control, Path(picture))
    for name, values in {**losses, CONTROL: control}.items():
        print(
            f"{name:34} last loss {values[-1]:.6f}, "
            f"at most {max(apart(values, losses['single'])):.1e} from parallel=single"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
