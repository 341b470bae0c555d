"""What engine=torch keeps in the host's memory (engine.offload_optimizer, engine.offload_parameters), and
what that excludes. Layouts are checked by plan.rules.
"""

from __future__ import annotations

from hybridtrain.config import schema
from hybridtrain.config.section_checks import one_of, require
from hybridtrain.errors import refusal
from hybridtrain.registry import BUILT_IN

OFFLOAD = ("none", "cpu")
_NEED_WHOLE = ("adafactor", "muon")


def check_values(engine: schema.EngineConfig) -> None:
    """Raise UserError for places that do not exist."""
    for name in ("offload_optimizer", "offload_parameters"):
        field, value = f"engine.{name}", getattr(engine, name)
        if value == "nvme":
            raise refusal(
                field, value, "not supported yet", allowed=", ".join(OFFLOAD), instead=f"{field}=cpu"
            )
        one_of(field, value, OFFLOAD)


def check_torch(config: schema.Config) -> None:
    """Raise UserError for what engine=torch cannot offload."""
    engine, kind = config.engine, config.optim.kind
    require(
        engine.offload_parameters == "none" or engine.offload_optimizer == "cpu",
        "engine.offload_parameters",
        engine.offload_parameters,
        "engine=torch updates weights where they are, so that the optimizer's state is there too",
        allowed="none, or cpu with engine.offload_optimizer=cpu",
        instead="engine.offload_optimizer=cpu",
    )
    require(
        engine.offload_optimizer == "none" or kind not in _NEED_WHOLE,
        "engine.offload_optimizer",
        engine.offload_optimizer,
        f"optim.kind={kind} exchanges parts of matrices between devices",
        allowed=f"cpu with {', '.join(each for each in BUILT_IN['optimizer'] if each not in _NEED_WHOLE)}",
        instead="engine.offload_optimizer=none engine.offload_parameters=none, or optim=adamw",
    )
    monitored = config.precision.monitor_every
    require(
        engine.offload_parameters == "none" or not monitored,
        "precision.monitor_every",
        monitored,
        "the numerics monitor reads weights and gradients on the device, and they are offloaded",
        allowed="0 with engine.offload_parameters=cpu",
        instead="engine.offload_parameters=none, or precision.monitor_every=0",
    )
