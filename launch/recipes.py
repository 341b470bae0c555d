"""What a precision costs in the loss: a byte model in each recipe, beside bf16_mixed with the same seed.

    python launch/recipes.py OUT [--seeds 5] [--steps 400] [--jobs 2]

A model of 0.46 million parameters on the embedded corpus, one process a run. Weights and the order of the
data are those of the seed, so differences are paired: OUT/recipes.md has for each recipe the mean of (its
held-out loss / that of bf16_mixed - 1) over the seeds, and the standard error of that mean. The same command
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

SETTINGS = (
    "model=tiny",
    "model.config.vocab_size=257",
    "model.config.hidden_size=128",
    "model.config.intermediate_size=128",
    "data.seq_len=128",
    "batch.global_batch_size=16",
    "batch.micro_batch_size=16",
    "optim.lr=1e-3",
    "schedule.warmup_steps=30",
    "train.eval_rows=512",
)
BASE = "bf16_mixed"
RECIPES = {
    BASE: ("precision=bf16_mixed",),
    "fp32": ("precision=fp32",),
    "fp8_tensorwise": ("precision=fp8_tensorwise",),
    "fp8_rowwise": ("precision=fp8_rowwise",),
    "bf16_pure (kahan)": ("precision=bf16_pure",),
    "bf16_pure, stochastic": ("precision=bf16_pure", "precision.rounding=stochastic"),
    "bf16_mixed, states in 8 bits": ("precision=bf16_mixed", "precision.state=8bit"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    given = parser.parse_args()
    out: Path = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    data = f"data.path={out}/bytes"
    command("prepare", data, "data.source=[stdlib]", "data.vocab_size=257", "data.seq_len=128")
    ends = (f"train.steps={given.steps}", f"train.eval_every={given.steps}")
    runs = [
        ("train", f"run.dir={folder(out, name, seed)}", f"run.seed={seed}", data, *SETTINGS, *ends, *options)
        for seed in range(given.seeds)
        for name, options in RECIPES.items()
    ]
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda words: command(*words), runs))
    losses = {name: [held_out(folder(out, name, seed)) for seed in range(given.seeds)] for name in RECIPES}
    table = "\n".join(lines(losses)) + "\n"
    (out / "recipes.md").write_text(table)
    print(table)


def folder(out: Path, name: str, seed: int) -> Path:
    return out / f"{''.join(c if c.isalnum() else '_' for c in name)}-{seed}"


def command(*words: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "hybridtrain.cli", *words], check=True, env=environment)


def held_out(run: Path) -> float:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["eval_loss"]


def lines(losses: dict[str, list[float]]) -> list[str]:
    """A table; losses by recipe and seed."""
    result = ["| recipe | held-out loss | against bf16_mixed | standard error |", "|---|---|---|---|"]
    for name, own in losses.items():
        more = [loss / base - 1 for loss, base in zip(own, losses[BASE], strict=True)]
        error = stdev(more) / math.sqrt(len(more)) if len(more) > 1 else math.nan
        paired = f"{mean(more):+.3%} | {error:.3%}" if name != BASE else " | "
        result.append(f"| {name} | {mean(own):.4f} | {paired} |")
    return result


if __name__ == "__main__":
    main()
