"""hybridtrain as a contestant of bench_peers.py: its optimizer step on the work that all contestants do, from
whichever checkout PYTHONPATH names.

The work: a model of --model's size, a Llama, or a Qwen3 or Mistral with "-qwen3" or "-mistral" after it, rows
of --seq random tokens, --gbs rows a step in micro-batches of --mbs, AdamW with clipping.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import os
from collections.abc import Callable
from typing import Any

SIZES = {  # hidden, layers, heads, key/value heads, ffn, vocabulary
    "tiny": (512, 8, 8, 4, 1408, 8192),
    "micro": (128, 4, 4, 2, 352, 1024),
}
FAMILIES = {"": "tiny", "qwen3": "nano", "mistral": "mistral_7b"}  # a file of conf/model
LAYOUTS = {
    "1p": "single",
    "dp2": "ddp",
    "zero1": "zero1",
    "zero2": "zero2",
    "zero3": "zero3",
    "tp2": "tp2",
    "pp2": "pp2",
}
PRECISIONS = {"fp32": "fp32", "bf16": "bf16_mixed"}


class Meter:
    """What bench_peers.py watches: `start()` before the first step, `lap(loss)` after each."""

    def start(self) -> None:
        """A step begins now."""

    def lap(self, loss: Any) -> None:
        """A step has ended, and its loss is known."""


def overrides(options: argparse.Namespace) -> list[str]:
    """The work in the words of the command line."""
    size, _, family = options.model.partition("-")
    hidden, layers, heads, kv_heads, ffn, vocab = SIZES[size]
    fields = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }
    fields |= {
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "max_position_embeddings": max(options.seq, 2048),
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    if family == "qwen3":
        fields["head_dim"] = hidden // heads
    words = [f"model={FAMILIES[family]}", *(f"model.config.{key}={value}" for key, value in fields.items())]
    words += [
        f"data.seq_len={options.seq}",
        f"batch.global_batch_size={options.gbs}",
        f"batch.micro_batch_size={options.mbs}",
    ]
    words += [f"parallel={LAYOUTS[options.mode]}", f"precision={PRECISIONS[options.prec]}", "optim.lr=3e-4"]
    return words + (["engine.compile=true"] if options.compile else [])


def _known(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Those of `options` that the checkout's `function` has: an earlier version may lack some."""
    return {key: value for key, value in options.items() if key in inspect.signature(function).parameters}


def main(argv: list[str]) -> None:
    """Warm up, then make the steps; each ends with a lap."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("mode", "prec", "model"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("seq", "gbs", "mbs", "warmup", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args(argv)

    from hybridtrain import engine as engines
    from hybridtrain.config.compose import compose
    from hybridtrain.data.synthetic import Synthetic

    mesh = importlib.import_module(
        "hybridtrain.parallel.mesh"
        if importlib.util.find_spec("hybridtrain.parallel.mesh")
        else "hybridtrain.mesh"
    )
    config = compose("bench", overrides(options))
    settled = engines.settle(
        config, **_known(engines.settle, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    )
    device = mesh.device()
    mesh.connect(device, **_known(mesh.connect, timeout_s=config.engine.timeout_s))
    engine: Any = engines.build(config, layout=settled.layout, plan=settled.plan, device=device)
    share = {
        "vocab": settled.facts.vocab,
        "plan": settled.plan,
        "dp_rank": engine.mesh.dp_rank,
        "dp_size": settled.layout.dp,
        "seed": 0,
    }
    tokens = Synthetic(
        **share,
        **_known(
            Synthetic, labels=0, head="", collate=getattr(getattr(engine, "task", None), "collate", None)
        ),
    )
    meter = Meter()
    meter.start()
    for step in range(options.warmup + options.steps):
        meter.lap(float(engine.train_step(tokens.micro_batches(step), lr=3e-4).loss))
    engine.close()
    mesh.disconnect()
