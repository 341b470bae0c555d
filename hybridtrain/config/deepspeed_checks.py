"""Options that DeepSpeed does not support, or would silently handle differently.

Layouts are checked by plan.rules.
"""

from __future__ import annotations

import importlib.util

from hybridtrain.config import schema
from hybridtrain.config.section_checks import require
from hybridtrain.errors import install


def check(config: schema.Config) -> None:
    """Raise UserError for a config that DeepSpeed cannot train under any layout."""
    engine, installed = config.engine, importlib.util.find_spec("deepspeed") is not None
    instead = f"{install('deepspeed')}, or engine=torch"
    require(
        installed,
        "engine.kind",
        "deepspeed",
        "the package deepspeed is not installed here",
        allowed="torch",
        instead=instead,
    )
    require(
        not engine.compile,
        "engine.compile",
        True,
        "not with engine=deepspeed yet",
        allowed="false",
        instead="engine=torch, or engine.compile=false",
    )
    _optimizer(config)
    frozen = config.model.freeze
    require(
        not frozen,
        "model.freeze",
        frozen,
        "DeepSpeed keeps frozen weights in 16 bits only",
        allowed="[]",
        instead="engine=torch",
    )
    if not isinstance(config, schema.ParityRoot):  # parity checks each of its layouts
        check_layout(config, config.parallel)
    for field, given in (("compute", config.precision.compute), ("rules", config.precision.rules)):
        require(
            not given,
            f"precision.{field}",
            given,
            "not with engine=deepspeed yet: its tensor parallelism has linear layers of its own",
            allowed="the formats of precision.kind",
            instead="engine=torch",
        )


def _optimizer(config: schema.Config) -> None:
    kind = config.optim.kind
    require(
        kind == "adamw",
        "optim.kind",
        kind,
        "engine=deepspeed has only AdamW",
        allowed="adamw",
        instead="engine=torch",
    )
    require(
        not config.optim.ema,
        "optim.ema",
        config.optim.ema,
        "engine=deepspeed keeps no average of the weights yet",
        allowed="0",
        instead="engine=torch",
    )
    state = config.precision.state
    require(
        state in ("auto", "fp32"),
        "precision.state",
        state,
        "engine=deepspeed keeps Adam's moments in fp32",
        allowed="auto, fp32",
        instead="engine=torch, or precision.state=auto",
    )


def check_layout(config: schema.Config, parallel: schema.ParallelConfig) -> None:
    """Raise UserError for options that DeepSpeed does not support at this ZeRO stage, or in a pipeline."""
    stage, rules = parallel.zero_stage, config.optim.rules
    require(
        not rules or parallel.pp == 1,
        "optim.rules",
        rules,
        "DeepSpeed adds the gradient norms of parameter groups over pipeline stages, one by one, and stages "
        f"have other groups (parallel.pp={parallel.pp})",
        allowed="[] with engine=deepspeed and a pipeline",
        instead="engine=torch, or parallel.pp=1",
    )
    problem = f"only ZeRO 3 has sharded parameters to offload (parallel.zero_stage={stage})"
    offload = config.engine.offload_parameters
    require(
        offload == "none" or stage == 3,
        "engine.offload_parameters",
        offload,
        problem,
        allowed="none",
        instead="parallel=zero3",
    )
    recompute, instead = config.recompute.kind, "recompute=full, or engine=torch"
    problem = (
        "DeepSpeed's ZeRO 3 gathers parameters inside the recomputed layers, "
        "which torch's selective recomputation does not allow"
    )
    require(
        stage < 3 or recompute != "selective",
        "recompute.kind",
        recompute,
        problem,
        allowed="none, full",
        instead=instead,
    )
