"""Watches steps of the DeepSpeed engine, and repeats one without an update, to find where non-finite numbers
began.

Layers of AutoTP add the parts of all tensor-parallel ranks inside their forward, so that a fault in one
rank's product is seen on all of them; a non-finite weight is seen on the rank that has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from hybridtrain.parallel import watch
from hybridtrain.parallel.watch import Watcher
from hybridtrain.runtime.flags import Flags
from hybridtrain.types import Batch, StepResult


def watching(engine: Any, watcher: Watcher) -> AbstractContextManager[None]:
    """Show `watcher` what the modules of this rank compute in the steps inside (parallel/watch.py)."""
    return watch.watching([engine.stage], [engine.mesh.coordinates["pp"]], watcher)


def replay(
    engine: Any, micro_batches: Sequence[Batch], *, loss_scale: Tensor, watcher: Watcher
) -> StepResult:
    """See types.Engine.replay."""
    scaler, flags = engine.scaler, engine.flags
    kept = (scaler.scale, scaler.finite, scaler.nonfinite)
    scaler.scale = loss_scale.cpu()
    engine.read_scale()
    engine.flags, engine.updates = Flags(()), False
    with watching(engine, watcher):
        result: StepResult = engine.train_step(micro_batches, lr=0.0)
    engine.flags, engine.updates = flags, True
    scaler.scale, scaler.finite, scaler.nonfinite = kept
    engine.read_scale()
    return result
