"""Engines: `settle` fits a config to the world, `build` goes the whole way from it to a running engine.

`capabilities` tells what an engine can do, without building it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hybridtrain.config.schema import Config
from hybridtrain.engine import deepspeed_config
from hybridtrain.errors import refusal
from hybridtrain.models import weights
from hybridtrain.models.facts import facts_of
from hybridtrain.plan import layout as layouts
from hybridtrain.plan import memory
from hybridtrain.plan.layout import BatchPlan, ParallelLayout
from hybridtrain.runtime import host
from hybridtrain.types import Capabilities, ModelFacts

if TYPE_CHECKING:
    import torch

    from hybridtrain.engine.deepspeed import DeepSpeedEngine
    from hybridtrain.engine.torch_native import TorchEngine


_SPLIT_BACKWARD_SINCE = (2, 13)
"""Torch 2.11 fails in schedules that split the backward pass: its weight pass on autograd functions written in Python, and gloo on V schedules."""


@dataclass(frozen=True)
class Settled:
    """What a config comes to in the world it runs in."""

    layout: ParallelLayout
    plan: BatchPlan
    facts: ModelFacts


def settle(config: Config, *, world_size: int) -> Settled:
    """Layout, batch plan and model facts of a config in a world of `world_size` processes; raises UserError for what does not fit. Imports no torch."""
    model = facts_of(config.model)
    weights.check(config.model, facts=model)
    layout = layouts.resolve(config.parallel, world_size=world_size)
    plan = layouts.plan_batch(config.batch, layout=layout, seq_len=config.data.seq_len)
    layouts.check(config.parallel, layout=layout, plan=plan, precision=config.precision.kind, facts=model, capabilities=able(config, config.engine.kind))
    if config.engine.kind == "deepspeed":
        deepspeed_config.build(config, plan=plan)  # for what it refuses
    check_device([config.engine.kind], precision=config.precision.kind)
    return Settled(layout, plan, model)


def capabilities(kind: str) -> Capabilities:
    """What the engine runs with the torch that is installed (which is not imported)."""
    if kind == "deepspeed":
        return _of_deepspeed()
    assert kind == "torch"
    torch = host.versions()["torch"]
    split = _release(torch) >= _SPLIT_BACKWARD_SINCE
    return Capabilities(
        engine="torch" if split else f"torch (with torch {torch})",
        axes=frozenset({"pp", "dp_replicate", "dp_shard", "tp"}),
        zero_stages=frozenset({0, 1, 2, 3}),
        schedules=frozenset(layouts.SCHEDULES) if split else frozenset(layouts.SCHEDULES) - frozenset(layouts.SPLIT_BACKWARD),
        precisions=frozenset({"fp32", "bf16_mixed", "bf16_pure", "fp16_mixed"}),
        pipelined_zero_stages=frozenset({0, 1, 2, 3}),
        sequence_parallel=True,
        hybrid_sharding=True,
        repeated_heads=True,
    )


def able(config: Config, kind: str) -> Capabilities:
    """What engine `kind` runs with these options. Kernels of inductor overwrite what a backward pass in two parts reads again: wrong gradients, silently."""
    found = capabilities(kind)
    if not config.engine.compile or config.engine.compile_backend != "inductor":
        return found
    engine = f"{found.engine} with engine.compile=true and inductor"
    return replace(found, engine=engine, schedules=found.schedules - frozenset(layouts.SPLIT_BACKWARD))


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
    )


def check_device(engines: list[str], *, precision: str) -> None:
    """Refuse a recipe that an engine does not run on this machine's device. DeepSpeed has fp16 on GPUs, and on CPUs whose oneDNN has."""
    if precision != "fp16_mixed" or "deepspeed" not in engines:
        return
    import torch

    if not (torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_fp16_supported()):
        problem, instead = "engine=deepspeed has no fp16 on this CPU", "precision=bf16_mixed, or engine=torch"
        raise refusal("precision.kind", precision, problem, allowed="fp32, bf16_mixed", instead=instead)


def _release(version: str) -> tuple[int, int]:
    """(2, 13) of "2.13.0+cpu"; a torch that does not say counts as new."""
    parts = version.split(".")
    return (int(parts[0]), int(parts[1])) if parts[0].isdecimal() and parts[1].isdecimal() else _SPLIT_BACKWARD_SINCE


def build(config: Config, *, layout: ParallelLayout, plan: BatchPlan, device: torch.device) -> TorchEngine | DeepSpeedEngine:
    """Mesh, stages, initial weights, optimizer and schedule (collective; the process group exists)."""
    return _build(config, layout=layout, plan=plan, device=device, initial=True)


def build_for_load(config: Config, *, layout: ParallelLayout, plan: BatchPlan, device: torch.device) -> TorchEngine | DeepSpeedEngine:
    """`build` without setting weights, for who loads a checkpoint next: drawing or reading them takes time, and their source may be gone."""
    return _build(config, layout=layout, plan=plan, device=device, initial=False)


def _build(config: Config, *, layout: ParallelLayout, plan: BatchPlan, device: torch.device, initial: bool) -> TorchEngine | DeepSpeedEngine:
    from hybridtrain.models.build import check
    from hybridtrain.runtime import cpu
    from hybridtrain.tasks.causal_lm import CausalLM

    check(config)
    model = facts_of(config.model)
    if device.type == "cuda":
        import torch

        available, place = torch.cuda.get_device_properties(device).total_memory, "GPU memory"
        memory.check(config, layout=layout, plan=plan, facts=model, available=available, place=place)
    else:
        available, place = memory.host_share(), "host memory"
        memory.check_host(config, layout=layout, plan=plan, facts=model)
    memory.warn(config, layout=layout, plan=plan, facts=model, available=available, place=place)
    cpu.apply(config.engine, device=device)
    task = CausalLM(loss_chunk=config.engine.loss_chunk)
    if config.engine.kind == "deepspeed":
        from hybridtrain.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config, layout=layout, plan=plan, device=device, initial=initial, task=task)
    from hybridtrain.engine.torch_native import TorchEngine

    return TorchEngine(config, layout=layout, plan=plan, device=device, initial=initial, task=task)
