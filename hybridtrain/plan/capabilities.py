"""The features that each engine supports: axes, ZeRO stages, schedules, precisions, and combinations.

No torch.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from typing import TYPE_CHECKING

from hybridtrain.plan.schedules import SCHEDULES, SPLIT_BACKWARD
from hybridtrain.types import Capabilities

if TYPE_CHECKING:
    from hybridtrain.config.schema import EngineConfig

_SPLIT_BACKWARD_SINCE = (2, 13)
"""torch 2.11 fails with schedules that split the backward pass: on Python autograd functions, and with
gloo on V schedules."""


def of_engine(kind: str) -> Capabilities:
    """The features of engine `kind` with the installed torch."""
    if kind == "deepspeed":
        return _of_deepspeed()
    assert kind == "torch"
    torch = _torch()
    split = _release(torch) >= _SPLIT_BACKWARD_SINCE
    return Capabilities(
        engine="torch" if split else f"torch (with torch {torch})",
        axes=frozenset({"pp", "dp_replicate", "dp_shard", "tp"}),
        zero_stages=frozenset({0, 1, 2, 3}),
        schedules=frozenset(SCHEDULES) if split else frozenset(SCHEDULES) - frozenset(SPLIT_BACKWARD),
        precisions=frozenset({"fp32", "fp64", "tf32", "bf16_mixed", "bf16_pure", "fp16_mixed"}),
        pipelined_zero_stages=frozenset({0, 1, 2, 3}),
        sequence_parallel=True,
        hybrid_sharding=True,
        repeated_heads=True,
        shared_modules=True,
        growing_batches=True,
    )


def with_options(engine: EngineConfig, *, kind: str) -> Capabilities:
    """The features of engine `kind` with these options.

    Offloaded parameters are gathered for each use, not once a step as in ZeRO 1 and 2. Kernels of inductor
    overwrite tensors that the second half of a split backward pass reads: wrong gradients, silently.
    """
    capabilities = of_engine(kind)
    if kind == "torch" and engine.offload_parameters == "cpu":
        capabilities = replace(
            capabilities,
            engine=f"{capabilities.engine} with engine.offload_parameters=cpu",
            axes=frozenset({"dp_replicate", "dp_shard"}),
            zero_stages=frozenset({0, 3}),
        )
    if not engine.compile or engine.compile_backend != "inductor":
        return capabilities
    name = f"{capabilities.engine} with engine.compile=true and inductor"
    return replace(capabilities, engine=name, schedules=capabilities.schedules - frozenset(SPLIT_BACKWARD))


def _of_deepspeed() -> Capabilities:
    return Capabilities(
        engine="deepspeed",
        axes=frozenset({"pp", "dp_replicate", "dp_shard", "tp"}),
        zero_stages=frozenset({0, 1, 2, 3}),
        schedules=frozenset({"1f1b"}),
        precisions=frozenset({"fp32", "bf16_mixed", "fp16_mixed"}),
        pipelined_zero_stages=frozenset({0, 1}),
        sequence_parallel=False,
        hybrid_sharding=False,
        repeated_heads=False,
        shared_modules=False,
        growing_batches=False,
    )


def _torch() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:  # on sys.path without metadata
        return "unknown"


def _release(version: str) -> tuple[int, int]:
    """(2, 13) from "2.13.0+cpu"; an unknown version counts as new."""
    parts = version.split(".")
    return (
        (int(parts[0]), int(parts[1]))
        if parts[0].isdecimal() and parts[1].isdecimal()
        else _SPLIT_BACKWARD_SINCE
    )
