"""What DeepSpeed cannot do or would do silently wrong; layouts are those of plan.rules."""

from __future__ import annotations

import importlib.util
import math

from hybridtrain import registry
from hybridtrain.config import schema
from hybridtrain.config.section_checks import require
from hybridtrain.errors import install


def check(config: schema.Config) -> None:
    """Refuse a config that DeepSpeed cannot train, under any layout (raises UserError)."""
    engine, there = config.engine, importlib.util.find_spec("deepspeed") is not None
    instead = f"{install('deepspeed')}, or engine=torch"
    require(there, "engine.kind", "deepspeed", "the package deepspeed is not installed here", allowed="torch", instead=instead)
    require(not engine.compile, "engine.compile", True, "not with engine=deepspeed yet", allowed="false", instead="engine=torch, or engine.compile=false")
    kind, allowed = config.optim.kind, ", ".join(registry.BUILT_IN["optimizer"])
    require(kind in registry.BUILT_IN["optimizer"], "optim.kind", kind, "engine=deepspeed runs AdamW alone", allowed=allowed, instead="engine=torch")
    frozen = config.model.freeze
    require(not frozen, "model.freeze", frozen, "DeepSpeed keeps frozen weights in 16 bits only", allowed="[]", instead="engine=torch")
    if not isinstance(config, schema.ParityRoot):  # parity has a stage for each of its layouts
        check_stage(config, config.parallel.zero_stage)
    if config.precision.kind == "fp16_mixed":
        _loss_scale(config.precision)


def _loss_scale(precision: schema.PrecisionConfig) -> None:
    power = math.log2(precision.init_scale)
    words = "DeepSpeed's first loss scale is a power of two"
    require(power == int(power), "precision.init_scale", precision.init_scale, words, allowed="powers of 2", instead="precision.init_scale=65536")
    for field, value, fixed in (("growth_factor", precision.growth_factor, 2.0), ("backoff_factor", precision.backoff_factor, 0.5)):
        words = "DeepSpeed's loss scale doubles and halves"
        require(value == fixed, f"precision.{field}", value, words, allowed=str(fixed), instead=f"engine=torch, or precision.{field}={fixed}")


def check_stage(config: schema.Config, stage: int) -> None:
    """What depends on the ZeRO stage (raises UserError)."""
    words = f"only ZeRO 3 has sharded parameters to offload (parallel.zero_stage={stage})"
    offloads = config.engine.offload_parameters
    require(offloads == "none" or stage == 3, "engine.offload_parameters", offloads, words, allowed="none", instead="parallel=zero3")
    recompute = config.recompute.kind
    words = "DeepSpeed gathers parameters inside what is recomputed, which torch's selective recomputation takes for a change"
    require(stage < 3 or recompute != "selective", "recompute.kind", recompute, words, allowed="none, full", instead="recompute=full, or engine=torch")
