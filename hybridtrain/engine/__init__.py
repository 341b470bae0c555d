"""Engines: `build` goes the whole way from a config to a running engine; `capabilities` tells what one can do, without building it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybridtrain.types import Capabilities

if TYPE_CHECKING:
    import torch

    from hybridtrain.config.schema import Config
    from hybridtrain.engine.torch_native import TorchEngine
    from hybridtrain.layout import BatchPlan, ParallelLayout


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
    from hybridtrain.engine.torch_native import TorchEngine

    return TorchEngine(config, layout=layout, plan=plan, device=device)
