"""What each engine runs: axes, ZeRO stages, schedules and precisions, alone and together. Known without building an engine, and without torch."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from typing import TYPE_CHECKING

from hybridtrain.plan.schedules import SCHEDULES, SPLIT_BACKWARD
from hybridtrain.types import Capabilities

if TYPE_CHECKING:
    from hybridtrain.config.schema import EngineConfig

_SPLIT_BACKWARD_SINCE = (2, 13)
"""Torch 2.11 fails in schedules that split the backward pass: its weight pass on autograd functions written in Python, and gloo on V schedules."""


def of_engine(kind: str) -> Capabilities:
    """What engine `kind` runs with the torch that is installed."""
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
        precisions=frozenset({"fp32", "bf16_mixed", "bf16_pure", "fp16_mixed"}),
        pipelined_zero_stages=frozenset({0, 1, 2, 3}),
        sequence_parallel=True,
        hybrid_sharding=True,
        repeated_heads=True,
        growing_batches=True,
    )


def able(engine: EngineConfig, *, kind: str) -> Capabilities:
    """What engine `kind` runs with these options. Kernels of inductor overwrite what a backward pass in two parts reads again: wrong gradients, silently."""
    found = of_engine(kind)
    if not engine.compile or engine.compile_backend != "inductor":
        return found
    name = f"{found.engine} with engine.compile=true and inductor"
    return replace(found, engine=name, schedules=found.schedules - frozenset(SPLIT_BACKWARD))


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
        growing_batches=False,
    )


def _torch() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:  # put on the path without being installed
        return "unknown"


def _release(version: str) -> tuple[int, int]:
    """(2, 13) of "2.13.0+cpu"; a torch that does not say counts as new."""
    parts = version.split(".")
    return (int(parts[0]), int(parts[1])) if parts[0].isdecimal() and parts[1].isdecimal() else _SPLIT_BACKWARD_SINCE
