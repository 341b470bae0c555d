"""Repeats a step of the DeepSpeed engine without an update, to find where non-finite numbers began.

Layers of AutoTP add the parts of all tensor-parallel ranks inside their forward, so that a fault in one
rank's product is seen on all of them; a non-finite weight is seen on the rank that has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hybridtrain.parallel.watch import Watcher, watching
from hybridtrain.runtime.flags import Flags
from hybridtrain.types import Batch, StepResult


def replay(
    engine: Any, micro_batches: Sequence[Batch], *, loss_scale: Tensor, watcher: Watcher
) -> StepResult:
    """See types.Engine.replay."""
    scaler, flags = engine.scaler, engine.flags
    kept = (scaler.scale, scaler.finite, scaler.nonfinite)
    scaler.scale = loss_scale.cpu()
    engine.read_scale()
    engine.flags, engine.updates = Flags(()), False
    with watching([engine.stage], [engine.mesh.coordinates["pp"]], watcher):
        result: StepResult = engine.train_step(micro_batches, lr=0.0)
    engine.flags, engine.updates = flags, True
    scaler.scale, scaler.finite, scaler.nonfinite = kept
    engine.read_scale()
    return result
