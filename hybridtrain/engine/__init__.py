"""Engines: `settle` fits a config to the world, `build` goes the whole way from it to a running engine.

`capabilities` tells what an engine can do, without building it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybridtrain import layout as layouts
from hybridtrain.config.schema import Config
from hybridtrain.layout import BatchPlan, ParallelLayout
from hybridtrain.models.facts import facts, read_config
from hybridtrain.types import Capabilities, ModelFacts, refusal

if TYPE_CHECKING:
    import torch

    from hybridtrain.engine.torch_native import TorchEngine


@dataclass(frozen=True)
class Settled:
    """What a config comes to in the world it runs in."""

    layout: ParallelLayout
    plan: BatchPlan
    facts: ModelFacts


def settle(config: Config) -> Settled:
    """Layout, batch plan and model facts of a config in the launcher's world; raises UserError for what does not fit. Imports no torch."""
    fields = read_config(config.model)
    model = facts(fields)
    _check_fields(fields)
    layout = layouts.resolve(config.parallel, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    plan = layouts.plan_batch(config.batch, layout=layout, seq_len=config.data.seq_len)
    layouts.check(config.parallel, layout=layout, plan=plan, precision=config.precision.kind, facts=model, capabilities=capabilities(config.engine.kind))
    return Settled(layout, plan, model)


def _check_fields(fields: dict[str, Any]) -> None:
    """What a config.json may ask for and training does not do yet."""
    if fields.get("attention_dropout"):
        raise refusal(
            "model.config.attention_dropout",
            fields["attention_dropout"],
            "dropout is not supported yet",
            allowed="0",
            instead="model.config.attention_dropout=0",
        )
    if fields.get("quantization_config"):
        raise refusal(
            "model.config.quantization_config",
            fields["quantization_config"],
            "training of quantised weights is not supported yet",
            allowed="unquantised weights, in any precision.kind",
            instead="the unquantised model with precision=bf16_mixed",
        )


def capabilities(kind: str) -> Capabilities:
    """What the engine runs (no torch is imported)."""
    assert kind == "torch"
    return Capabilities(
        engine="torch",
        axes=frozenset({"pp", "dp_replicate", "dp_shard", "tp"}),
        zero_stages=frozenset({0, 1, 2, 3}),
        schedules=frozenset({"gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv_zero_bubble", "dualpipev"}),
        precisions=frozenset({"fp32", "bf16_mixed", "bf16_pure", "fp16_mixed"}),
    )


def build(config: Config, *, layout: ParallelLayout, plan: BatchPlan, device: torch.device) -> TorchEngine:
    """Mesh, stages, weights, optimizer and schedule (collective; the process group exists)."""
    from hybridtrain import backend
    from hybridtrain.engine.torch_native import TorchEngine

    backend.apply(config.engine, device=device)
    return TorchEngine(config, layout=layout, plan=plan, device=device)
