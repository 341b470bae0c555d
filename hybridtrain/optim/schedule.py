"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from hybridtrain import registry
from hybridtrain.config.schema import ScheduleConfig
from hybridtrain.errors import refusal


def lr_at(step: int, *, peak: float, schedule: ScheduleConfig, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total_steps`. `peak`: optim.lr.

    Raises UserError if a user's schedule returns no valid factor.
    """
    warmup = schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if registry.lookup("schedule", schedule.kind) is not None:
        factor = registry.call("schedule", schedule.kind, step, schedule, total_steps)
        if not (isinstance(factor, int | float) and 0 <= factor < math.inf):
            problem = f"it returned {factor!r} for step {step} of {total_steps}"
            raise refusal(
                "schedule.kind",
                schedule.kind,
                problem,
                allowed="a Python number of 0 or more, the factor of optim.lr",
                instead="float(...), max(0.0, ...)",
            )
        return peak * factor
    floor = schedule.min_lr_ratio
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "wsd":
        decay = schedule.decay_steps or max(1, total_steps // 10)
        done = max(0.0, (step + 1 - (total_steps - decay)) / decay)
        return peak * (1.0 - (1.0 - floor) * min(1.0, done))
    done = min(1.0, (step - warmup) / max(1, total_steps - 1 - warmup))
    if schedule.kind == "linear":
        return peak * (1.0 - (1.0 - floor) * done)
    assert schedule.kind == "cosine"
    return peak * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done)))
