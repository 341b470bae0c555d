"""Runs to export, as the trainer leaves them, and exports read back."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hybridtrain.checkpoint import sharded
from hybridtrain.config import compose
from hybridtrain.config.schema import Config, ExportConfig, ExportRoot, RunConfig
from hybridtrain.types import Progress


def model_of(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(3)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 11,
        "num_attention_heads": 2,
        "vocab_size": 37,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied, eos_token_id=1, bos_token_id=1))


def run_of(folder: Path, model: LlamaForCausalLM, *, tied: bool) -> Path:
    """A run directory as the trainer leaves it: config.yaml, model/, one checkpoint; and
    its data's tokenizer."""
    run = folder / "run"
    model.config.save_pretrained(run / "model")
    model.generation_config.save_pretrained(run / "model")
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a")), eos_token="</s>"
    ).save_pretrained(folder / "data" / "tokenizer")
    config = Config()
    config.data.path = str(folder / "data")
    (run / "config.yaml").write_text(compose.to_yaml(config))
    for step in (10, 20):
        tensors = {
            f"model.{name}": value
            for name, value in model.state_dict().items()
            if not (tied and name == "lm_head.weight")
        }
        tensors |= {f"optim.{name}.exp_avg": torch.zeros_like(p) for name, p in model.named_parameters()}
        sharded.save(
            tensors,
            path=run / "checkpoints" / f"step-{step:08d}",
            progress=Progress(step, step, {}),
            group=None,
            asynchronous=False,
        ).result()
    return run


def read_back(out: Path) -> dict[str, torch.Tensor]:
    result = {}
    for file in sorted(out.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            # (safe_open is no mapping)
            result |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return result


def exporting(run: Path, **options: object) -> ExportRoot:
    return ExportRoot(run=RunConfig(dir=str(run)), export=ExportConfig(**options))  # type: ignore[arg-type]


def as_earlier(checkpoint: Path) -> None:
    """Make a checkpoint what earlier releases wrote: without the model's config.json and
    generation_config.json."""
    listed = json.loads((checkpoint / "complete.json").read_text())
    for name in ("config.json", "generation_config.json"):
        (checkpoint / name).unlink()
        del listed["files"][name]
    (checkpoint / "complete.json").write_text(json.dumps(listed))
