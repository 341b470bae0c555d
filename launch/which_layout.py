#!/usr/bin/env python3
"""The README's table: layouts of models on GPUs of 80 GB, and what a rank of each holds. No GPU is needed.

python launch/which_layout.py
"""

from __future__ import annotations

from hybridtrain.config import compose
from hybridtrain.engine import settle
from hybridtrain.plan import memory

WORK = (
    "precision=bf16_mixed",
    "data.seq_len=2048",
    "batch.micro_batch_size=1",
    "data.path=x",
    "train.steps=1",
)
ROWS = (
    ("qwen3_0_6b", 1, "parallel=single"),
    ("llama_1_1b", 1, "parallel=single"),
    ("llama3_1_8b", 4, "parallel=zero3"),
    ("llama3_1_8b", 8, "parallel=zero3_tp2"),
    ("qwen3_32b", 16, "parallel=zero3_tp2"),
    ("llama3_1_70b", 32, "parallel=zero3 parallel.tp=8"),
    ("llama3_1_70b", 64, "parallel=zero1 parallel.tp=8 parallel.pp=4"),
)


def gib(model: str, gpus: int, words: str) -> tuple[float, float]:
    """GiB of the rank that needs most: weights, gradients, optimizer state and their copies;
    activations (an estimate)."""
    config = compose.train_config(
        [f"model={model}", *WORK, f"batch.global_batch_size={4 * gpus}", *words.split()]
    )
    found = settle(config, world_size=gpus)
    need = memory.needs(
        config, parallel=config.parallel, layout=found.layout, plan=found.plan, facts=found.facts
    )
    kept = memory.activations(config, layout=found.layout, plan=found.plan, facts=found.facts)
    return need.total / memory.GIB, kept / memory.GIB


def table() -> str:
    """In Markdown."""
    lines = ["| model | GPUs | layout | GiB per GPU | plus activations, about |", "|---|---|---|---|---|"]
    for model, gpus, words in ROWS:
        state, activations = gib(model, gpus, words)
        lines.append(f"| `{model}` | {gpus} | `{words}` | {state:.1f} | {activations:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
