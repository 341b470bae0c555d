"""Small models in Hugging Face folders, and rows for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hybridtrain.config.schema import ModelConfig
from hybridtrain.models import build
from hybridtrain.models.init import WeightSource, draw
from hybridtrain.models.load import pretrained
from hybridtrain.models.source import read_config
from hybridtrain.types import Batch
from tests.cases import GPT2, model

BERT = {
    **{"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 256, "max_position_embeddings": 64},
    **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1},
}
FIELDS: dict[str, dict[str, Any]] = {
    "llama": model("llama", num_hidden_layers=2),
    "qwen3": model("qwen3", num_hidden_layers=2, tie_word_embeddings=True),
    "gemma2": {
        **model("gemma2", num_hidden_layers=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=8),
        "tie_word_embeddings": True,
    },
    "bert": BERT,
    "mixtral": model("mixtral", num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": model(
        **{"model_type": "qwen3_moe", "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
    "gpt2": {**GPT2, "n_layer": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


def write(folder: Path, kind: str) -> Path:
    """A model of a kind, with random weights, in fp32."""
    config = build.hf_config(FIELDS[kind], chosen={}, attention="sdpa")
    torch.manual_seed(3)
    module: Any = build.plain_model(config)
    module.save_pretrained(folder)
    return folder


def opened(folder: Path) -> tuple[Any, WeightSource]:
    """(transformers config, weights) of a folder."""
    model_config = ModelConfig(from_pretrained=str(folder))
    config = build.hf_config(read_config(model_config), chosen={}, attention="sdpa")
    return config, pretrained(model_config, config, fresh=draw(config, seed=0))


def plain(folder: Path, dtype: torch.dtype | str) -> Any:
    """transformers' own model."""
    from transformers import AutoConfig

    kind = build.auto_class(AutoConfig.from_pretrained(folder))
    return kind.from_pretrained(folder, dtype=dtype).eval()


def rows(count: int) -> list[Batch]:
    """Micro-batches of four rows of 32 tokens, some likelier than others."""
    torch.manual_seed(5)
    ids = (torch.rand(count, 33).square() * 250).long()
    positions = torch.arange(32).expand(count, -1)
    batch = Batch(ids[:, :-1], ids[:, 1:].clone(), positions, packed=False)
    return [batch.rows(at, at + 4) for at in range(0, count, 4)]
