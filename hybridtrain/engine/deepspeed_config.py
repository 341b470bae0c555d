"""Builds DeepSpeed's config from ours. Imports neither torch nor deepspeed.

Keys that correspond to an option of ours are set by that option only; `engine.config_overrides`
may set all others.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

from hybridtrain.config.schema import Config
from hybridtrain.errors import refusal
from hybridtrain.plan.batch import BatchPlan

NEVER = 10**9
_OWNED = {
    "train_batch_size": "batch.global_batch_size",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.global_batch_size",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim",
    "scheduler": "schedule",
    "fp16": "precision",
    "bf16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "tensor_parallel": "parallel.tp",
    "sequence_parallel_size": "parallel.cp",
    "pipeline": "parallel.pp",
    "checkpoint": "checkpoint",
    "managed_gradient_accumulation": "batch.global_batch_size",
}
"""Sections of DeepSpeed's config -> the option of ours that sets them."""
_BUCKETS = dict.fromkeys(("reduce_bucket_size", "allgather_bucket_size"), 2**23)
"""Elements per communication, 32 MiB in fp32. DeepSpeed's default, 5e8, takes 2 GB per buffer.
Overrides may change it."""


def zero_stage(config: Config) -> int:
    """The stage for DeepSpeed: 1 instead of 0, which clips and scales gradients wrongly.

    Both compute the same update.
    """
    return max(1, config.parallel.zero_stage)


def build(config: Config, *, plan: BatchPlan) -> dict[str, Any]:
    """DeepSpeed's config. Raises UserError for an override that contradicts an option of ours."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.grad_accum,
        "gradient_clipping": config.optim.clip,
        "zero_optimization": {"stage": zero_stage(config), **_BUCKETS, **_offload(config)},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": NEVER,
        **_precision(config),
    }
    _check_overrides(settings, config.engine.config_overrides)
    return _merge(settings, config.engine.config_overrides)


def _offload(config: Config) -> dict[str, Any]:
    parts = {
        "offload_optimizer": config.engine.offload_optimizer,
        "offload_param": config.engine.offload_parameters,
    }
    return {name: {"device": device} for name, device in parts.items() if device != "none"}


def _precision(config: Config) -> dict[str, Any]:
    """Gradients are accumulated and reduced in fp32 in every precision.

    Of `fp16`, only `enabled` has an effect: the scale is ours (deepspeed/scale.py).
    """
    precision = config.precision
    fp32_gradients = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    if precision.kind == "bf16_mixed":
        return {"bf16": {"enabled": True, "check_grad_overflow": True}, **fp32_gradients}
    if precision.kind == "fp16_mixed":
        scaler = {
            "enabled": True,
            "loss_scale": precision.static_scale or 0,
            "initial_scale_power": max(0, round(math.log2(precision.init_scale))),
            "loss_scale_window": precision.growth_interval,
            "hysteresis": precision.hysteresis,
            "min_loss_scale": precision.min_scale,
        }
        return {"fp16": scaler, **fp32_gradients}
    return {}


def _check_overrides(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    ours = dict(_leaves(settings, ()))
    for path, value in _leaves(overrides, ()):
        name = ".".join(path)
        if path[0] in _OWNED:
            field = _OWNED[path[0]]
            raise refusal(
                f"engine.config_overrides.{name}",
                value,
                f"{field} decides this",
                allowed="keys that no other field decides",
                instead=f"the option {field}",
            )
        if path in ours and ours[path] != value and path[-1] not in _BUCKETS:
            raise refusal(
                f"engine.config_overrides.{name}",
                value,
                f"the rest of the config says {ours[path]}",
                allowed=str(ours[path]),
                instead="the option that decides it",
            )


def _leaves(mapping: Mapping[str, Any], above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


def _merge(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(dict(settings))
    for key, value in overrides.items():
        result[key] = (
            _merge(result[key], value)
            if isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            else copy.deepcopy(value)
        )
    return result
