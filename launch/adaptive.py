"""Adaptive precision, on a model of which it is known which layers need it.

    python launch/adaptive.py OUT [--steps 120] [--layouts]

A small byte model is trained, and outliers are planted in seven of its linear layers, without changing what
it computes: a channel is multiplied by 1e6 where it is made, and divided by it where it is used. Those layers
are frozen (Adam would undo the plant), and the rest is trained on, in fp32 with the linear layers in bf16,
fp8 and fp16, each of them static and adaptive. OUT/adaptive.md has the table, OUT/adaptive.png the picture.

--layouts: the adaptive fp8 run again with 2 tensor-parallel ranks, with 2 pipeline stages, and with a stop
and a resumption in the middle. Their decisions have to be the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

FACTOR = 1e6
MODEL = (
    "model=tiny",
    "model.config.vocab_size=257",
    "model.config.hidden_size=96",
    "model.config.intermediate_size=256",
)
BASE = ("data.seq_len=64", "batch.global_batch_size=16", "batch.micro_batch_size=8", "train.log_every=1")
STARTED = (
    *BASE,
    "optim.lr=3e-4",
    "schedule.warmup_steps=10",
    "train.eval_rows=256",
    "train.max_nonfinite=1000",
)
PLANTED = {
    *(f"model.layers.{layer}.mlp.{name}" for layer in (1, 2) for name in ("up_proj", "down_proj")),
    *(f"model.layers.2.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")),
}
ADAPTIVE = ("precision.adaptive=true", "precision.monitor_every=5")
FP16 = ("precision.compute=fp16", "precision.static_scale=1024")
RUNS = {
    "fp32": (),
    "bf16": ("precision.compute=bf16",),
    "fp8": ("precision.compute=fp8_tensorwise",),
    "fp8_rowwise": ("precision.compute=fp8_rowwise",),
    "fp8_adaptive": ("precision.compute=fp8_tensorwise", *ADAPTIVE, "precision.ladder=[fp8_tensorwise,bf16]"),
    "fp16": FP16,
    "fp16_adaptive": (*FP16, *ADAPTIVE, "precision.ladder=[fp16,bf16]"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--layouts", action="store_true")
    given = parser.parse_args()
    out: Path = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    data = f"data.path={out}/bytes"
    if not (out / "planted").exists():
        command("prepare", data, "data.source=[stdlib]", "data.vocab_size=257", "data.seq_len=64")
        command("train", f"run.dir={out}/base", data, *BASE, *MODEL, "optim.lr=3e-3", "train.steps=300")
        command("export", f"run.dir={out}/base", f"export.out={out}/base-export")
        plant(out / "base-export", out / "planted")
    frozen = [*sorted(f"{name}.weight" for name in PLANTED), "model.layers.2.input_layernorm.weight"]
    common = (f"model.from_pretrained={out}/planted", f"model.freeze=[{','.join(frozen)}]", data, *STARTED)
    common = (*common, f"train.steps={given.steps}", f"train.eval_every={given.steps}")
    for name, options in RUNS.items():
        if not (out / name).exists():
            command("train", f"run.dir={out}/{name}", *common, *options, may_fail=name == "fp16")
    if given.layouts:
        adaptive = (*common, *RUNS["fp8_adaptive"])
        command("train", "--nproc", "2", f"run.dir={out}/tp2", *adaptive, "parallel.tp=2")
        command("train", "--nproc", "2", f"run.dir={out}/pp2", *adaptive, "parallel.pp=2")
        again = (f"run.dir={out}/resumed", *adaptive, "checkpoint.every=2")
        command("train", *again, "train.steps=2", "train.eval_every=0")
        command("train", *again)
    write(out, layouts=given.layouts)


def command(*words: str, may_fail: bool = False) -> None:
    """A command of hybridtrain. `may_fail`: a run in which no step is finite ends with an error."""
    subprocess.run([sys.executable, "-m", "hybridtrain.cli", *words], check=not may_fail)


def plant(source: Path, target: Path) -> None:
    """A copy of a model that computes the same, with one outlier channel in each layer of PLANTED."""
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors" and file.name != "hybridtrain.json":  # which has their checksum
            (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(source / "model.safetensors")
    for layer in (1, 2):
        weights[f"model.layers.{layer}.mlp.up_proj.weight"][5] *= FACTOR
        weights[f"model.layers.{layer}.mlp.down_proj.weight"][:, 5] /= FACTOR
    weights["model.layers.2.input_layernorm.weight"][7] *= FACTOR
    for name in ("q_proj", "k_proj", "v_proj"):
        weights[f"model.layers.2.self_attn.{name}.weight"][:, 7] /= FACTOR
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def rows(path: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (path / name).read_text().splitlines()]


def decisions(run: Path) -> list[tuple[int, str]]:
    """(step, what was decided) of a run."""
    return [(row["step"], row["detail"]) for row in rows(run, "events.jsonl") if row["kind"] == "precision"]


def write(out: Path, *, layouts: bool) -> None:
    """The table and the picture; fails if a layout decided otherwise."""
    losses = {name: rows(out / name, "metrics.jsonl")[-1].get("eval_loss") for name in RUNS}
    lines = [
        "| linear layers | held-out loss | against bf16 | updates skipped | decisions |",
        "|---|---|---|---|---|",
    ]
    for name in RUNS:
        skipped = sum(row["skipped"] for row in rows(out / name, "metrics.jsonl"))
        made = decisions(out / name)
        right = {text.partition(":")[0] for _, text in made} & PLANTED
        share = "" if losses[name] is None else f"{losses[name] / losses['bf16'] - 1:+.2%}"
        found = (
            f"{len(made)}, {len(right)} of the {len(PLANTED)} planted" if name.endswith("adaptive") else ""
        )
        loss = "not finite" if losses[name] is None else f"{losses[name]:.4f}"
        lines.append(f"| {name} | {loss} | {share} | {skipped} | {found} |")
    for name in ("tp2", "pp2", "resumed") if layouts else ():
        same = decisions(out / name) == decisions(out / "fp8_adaptive")
        lines.append(f"| fp8_adaptive, {name} | | | | {'the same' if same else 'OTHERS'} |")
    (out / "adaptive.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    draw(out)
    if "OTHERS" in "".join(lines):
        raise SystemExit(1)


def draw(out: Path) -> None:
    """Losses over steps, less that of fp32 on the same rows, and the layers promoted by then."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 1))
    exact = [row["step_loss"] for row in rows(out / "fp32", "metrics.jsonl")]
    for name in RUNS:
        losses = [row["step_loss"] for row in rows(out / name, "metrics.jsonl")]
        known = [step for step, loss in enumerate(losses) if loss is not None]
        if known:
            more = [losses[step] - exact[step] for step in known]
            above.plot([step + 1 for step in known], more, label=name, lw=1)
    above.set_ylabel("loss above that of fp32")
    above.legend(fontsize=8)
    for name in ("fp8_adaptive", "fp16_adaptive"):
        steps = [
            0,
            *(step for step, _ in decisions(out / name)),
            rows(out / name, "metrics.jsonl")[-1]["step"],
        ]
        below.step(steps, [0, *range(1, len(steps) - 1), len(steps) - 2], where="post", label=name)
    below.axhline(len(PLANTED), color="grey", lw=0.5)
    below.set_ylabel("promoted layers")
    below.set_xlabel("step")
    below.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "adaptive.png", dpi=100)


if __name__ == "__main__":
    main()
