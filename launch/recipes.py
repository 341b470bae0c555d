"""What a precision costs in the loss: a byte model in each recipe, beside bf16_mixed with the same seed.

    python launch/recipes.py OUT [--seeds 5] [--steps 400] [--further 200] [--jobs 2]

A model of 0.46 million parameters on the embedded corpus, one process a run. For each seed, every recipe
trains it from scratch, and trains further, at a tenth of the rate, what fp32 made of it. Weights and the
order of the data are those of the seed, so differences are paired: OUT/recipes.md has for each recipe the
mean of (its held-out loss / that of bf16_mixed - 1) over the seeds, and the standard error of that mean. The
same command goes on where it stopped.
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

SCRATCH = (
    "model=tiny",
    "model.config.vocab_size=257",
    "model.config.hidden_size=128",
    "model.config.intermediate_size=128",
)
SETTINGS = (
    "data.seq_len=128",
    "batch.global_batch_size=16",
    "batch.micro_batch_size=16",
    "schedule.warmup_steps=30",
    "train.eval_rows=512",
)
BASE = "bf16_mixed"
TRAINED = "fp32"
"""The recipe that makes the models which are trained further."""
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
    parser.add_argument("--further", type=int, default=200, help="steps of a model that is trained already")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    given = parser.parse_args()
    out: Path = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    data = f"data.path={out}/bytes"
    command("prepare", data, "data.source=[stdlib]", "data.vocab_size=257", "data.seq_len=128")
    losses = {}
    for phase, steps, rate in (("scratch", given.steps, 1e-3), ("further", given.further, 1e-4)):
        ends = (data, f"train.steps={steps}", f"train.eval_every={steps}", f"optim.lr={rate}")
        losses[phase] = train(out, phase, ends=ends, seeds=given.seeds, jobs=given.jobs)
    table = "\n".join(lines(losses)) + "\n"
    (out / "recipes.md").write_text(table)
    print(table)


def train(out: Path, phase: str, *, ends: tuple[str, ...], seeds: int, jobs: int) -> dict[str, list[float]]:
    """Held-out losses of every recipe, by seed."""

    def one(name: str, seed: int) -> float:
        run = folder(out, phase, name, seed)
        trained = folder(out, "scratch", TRAINED, seed)
        start = SCRATCH if phase == "scratch" else (f"model.from_pretrained={trained}/export",)
        command("train", f"run.dir={run}", f"run.seed={seed}", *start, *SETTINGS, *ends, *RECIPES[name])
        if run == trained:
            command("export", str(run))
        return held_out(run)

    with ThreadPoolExecutor(jobs) as pool:
        found = {(name, seed): pool.submit(one, name, seed) for seed in range(seeds) for name in RECIPES}
        return {name: [found[name, seed].result() for seed in range(seeds)] for name in RECIPES}


def folder(out: Path, phase: str, name: str, seed: int) -> Path:
    return out / phase / f"{''.join(c if c.isalnum() else '_' for c in name)}-{seed}"


def command(*words: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "hybridtrain.cli", *words], check=True, env=environment)


def held_out(run: Path) -> float:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["eval_loss"]


def lines(losses: dict[str, dict[str, list[float]]]) -> list[str]:
    """A table; losses by phase, recipe and seed."""
    heads = " | ".join(f"{phase}: held-out loss | against {BASE} | standard error" for phase in losses)
    return [
        f"| recipe | {heads} |",
        "|---" * (1 + 3 * len(losses)) + "|",
        *(f"| {name} | {' | '.join(cells(own, name) for own in losses.values())} |" for name in RECIPES),
    ]


def cells(losses: dict[str, list[float]], name: str) -> str:
    more = [loss / base - 1 for loss, base in zip(losses[name], losses[BASE], strict=True)]
    error = stdev(more) / math.sqrt(len(more)) if len(more) > 1 else math.nan
    paired = f"{mean(more):+.3%} | {error:.3%}" if name != BASE else " | "
    return f"{mean(losses[name]):.4f} | {paired}"


if __name__ == "__main__":
    main()
