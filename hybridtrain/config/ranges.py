"""The range of every number: values outside are typing errors, or would overflow or take years.

The limits are wide on purpose. Whether values make sense together is checked with the rules of a section.
"""

from __future__ import annotations

import dataclasses
import math

from hybridtrain.config import schema
from hybridtrain.config.keys import PATHS
from hybridtrain.errors import refusal

_SECONDS = 10.0**8  # three years
_STEPS = 10**12
_ROWS = 1 << 26
_RANKS = 1 << 20
PLACES = (*PATHS, "run.name")
RANGES: dict[str, tuple[float, float]] = {
    "run.seed": (0, (1 << 63) - 1),
    "generate.seed": (-1, (1 << 63) - 1),  # -1: run.seed
    "adapters.rank": (1, 1 << 20),
    "adapters.alpha": (0, 1e9),
    "adapters.dropout": (0, 0.999),
    "task.label_smoothing": (0, 1),
    "task.z_loss": (0, 1),
    "task.mask_rate": (0, 1),
    "run.stop_before_s": (0, _SECONDS),
    "data.vocab_size": (0, 1 << 28),
    "data.eval_fraction": (0, 1),
    "data.seq_len": (1, 1 << 30),
    "batch.global_batch_size": (1, _ROWS),
    "batch.micro_batch_size": (1, _ROWS),
    "batch.ramp_start": (0, _ROWS),
    "batch.ramp_increment": (0, _ROWS),
    "batch.ramp_steps": (0, _STEPS),
    "batch.seq_len_start": (0, 1 << 30),
    "batch.seq_len_steps": (0, _STEPS),
    "train.steps": (0, _STEPS),
    "train.tokens": (0, 10**18),
    "train.epochs": (0, 10**6),
    "train.log_every": (1, _STEPS),
    "train.eval_every": (0, _STEPS),
    "train.eval_rows": (1, _ROWS),
    "train.sample_tokens": (1, 1 << 20),
    "train.guard_every": (0, _STEPS),
    "train.max_step_s": (0, _SECONDS),
    "train.max_nonfinite": (1, _STEPS),
    "train.spike_threshold": (0.1, 1e6),
    "train.spike_grad_threshold": (0, 1e6),
    "train.max_spikes": (1, _STEPS),
    "train.max_rollbacks": (1, 10**6),
    "parallel.pp": (-1, _RANKS),
    "parallel.dp_replicate": (-1, _RANKS),
    "parallel.dp_shard": (-1, _RANKS),
    "parallel.cp": (-1, _RANKS),
    "parallel.tp": (-1, _RANKS),
    "parallel.zero_stage": (0, 3),
    "parallel.virtual_stages": (0, 1 << 14),
    "engine.timeout_s": (1, int(_SECONDS)),
    "engine.loss_chunk": (0, 1 << 40),
    "engine.threads": (0, 1 << 14),
    "precision.adaptive_patience": (1, 10**6),
    "precision.adaptive_budget": (0, 1),
    "precision.high_first": (0, 1 << 14),
    "precision.high_last": (0, 1 << 14),
    "precision.init_scale": (2.0**-100, 2.0**100),
    "precision.growth_factor": (1, 2.0**32),
    "precision.backoff_factor": (0, 1),
    "precision.growth_interval": (1, (1 << 31) - 1),
    "precision.min_scale": (2.0**-100, 2.0**100),
    "precision.monitor_every": (0, _STEPS),
    "precision.static_scale": (2.0**-100, 2.0**100),
    "precision.hysteresis": (1, (1 << 31) - 1),
    "optim.lr": (0, 1e4),
    "optim.eps": (0, 1.0),
    "optim.weight_decay": (0, 1e4),
    "optim.momentum": (0, 1),
    "optim.ema": (0, 1),
    "optim.clip": (0, 1e30),
    "schedule.warmup_steps": (0, _STEPS),
    "schedule.min_lr_ratio": (0, 1),
    "schedule.decay_steps": (0, _STEPS),
    "checkpoint.every": (0, _STEPS),
    "checkpoint.keep_last": (0, _STEPS),
    "checkpoint.keep_every": (0, _STEPS),
    "prepare.workers": (0, 1 << 12),
    "parity.max_processes": (1, 1 << 10),
    "inspect.tp": (1, 1 << 10),
    "parity.steps": (1, 10**6),
    "bench.warmup": (1, 10**6),
    "bench.steps": (1, 10**6),
    "bench.rounds": (1, 10**6),
    "export.max_shard_gb": (1e-6, 1e6),
    "evaluate.rows": (0, _ROWS),
    "lm_eval.limit": (0, 10**9),
    "lm_eval.batch_size": (1, 1 << 20),
    "compare.rows": (0, _ROWS),
    "quantize.rows": (1, _ROWS),
    "quantize.eval_rows": (0, _ROWS),
    "quantize.budget": (0, 1.0),
    "compare.calibration_rows": (1, _ROWS),
    "inference.max_memory_gb": (0, 1e6),
    "compare.speed": (0, 1 << 16),
    "generate.max_new_tokens": (1, 1 << 30),
    "generate.temperature": (0, 100.0),
    "generate.top_p": (0, 1),
    "cluster.nodes": (1, 1 << 16),
    "cluster.gpus_per_node": (0, 1 << 10),
    "cluster.ranks_per_node": (0, 1 << 12),
    "cluster.cpus_per_node": (0, 1 << 14),
    "cluster.signal_before_s": (0, 65535),
    "cluster.max_restarts": (0, 10**6),
    "cluster.health_timeout_s": (0, 86400),
    "cluster.array_at_once": (0, 10**6),
    "logs.lines": (0, 10**9),
}
"""Option -> (smallest, largest)."""


def check(config: schema.Root) -> None:
    """Refuse numbers out of range, and text that cannot be a file name or
    environment variable (raises UserError).
    """
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        for option in dataclasses.fields(values):
            field, value = f"{section.name}.{option.name}", getattr(values, option.name)
            if field in RANGES and value is not None:
                _number(field, value, *RANGES[field], default=option.default)
            for text in _texts(value):
                _text(field, text)


def _number(field: str, value: float, least: float, most: float, *, default: object) -> None:
    if not (math.isfinite(value) and least <= value <= most):
        instead = (
            f"{field}={default}"
            if isinstance(default, int | float) and least <= default <= most and default
            else f"{field}=VALUE in that range"
        )
        raise refusal(
            field, value, "out of range", allowed=f"{_shown(least)} to {_shown(most)}", instead=instead
        )


def _shown(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def _texts(value: object) -> list[str]:
    if isinstance(value, dict):
        return [*(str(key) for key in value), *(item for part in value.values() for item in _texts(part))]
    if isinstance(value, list):
        return [item for part in value for item in _texts(part)]
    return [str(value)] if isinstance(value, str) else []


def _text(field: str, text: str) -> None:
    if "\0" in text:
        raise refusal(
            field,
            repr(text[:60]),
            "it has a NUL character",
            allowed="text without",
            instead=f"{field} without it",
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise refusal(
            field, ascii(text[:60]), "it is not UTF-8", allowed="text in UTF-8", instead=f"{field} in UTF-8"
        ) from None
    if field in PLACES and any(len(part.encode()) > 255 for part in text.split("/")):
        raise refusal(
            field,
            f"{text[:60]}...",
            "a name in it has more than 255 bytes",
            allowed="up to 255 for each",
            instead=f"a shorter {field}",
        )
    if field in PLACES and len(text.encode()) > 4000:
        raise refusal(
            field,
            f"{text[:60]}...",
            "it has more than 4,000 bytes",
            allowed="up to 4,000",
            instead=f"a shorter {field}",
        )
