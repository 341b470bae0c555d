"""What the numerics monitor needs of the DeepSpeed engine (parallel/monitor.py)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from torch import Tensor, nn

from hybridtrain.models.slicing import NOTHING
from hybridtrain.models.stage import Stage
from hybridtrain.parallel.monitor import Gradients, WeightShard
from hybridtrain.parallel.watch import Watcher

if TYPE_CHECKING:
    from hybridtrain.engine.deepspeed import DeepSpeedEngine


class OfDeepSpeed:
    """See parallel.monitor.Monitored. Without tensor parallelism: engine/__init__.py refuses it."""

    slicing = NOTHING

    def __init__(self, engine: DeepSpeedEngine):
        self.engine, self.mesh = engine, engine.mesh
        # The loss is dp times as large, because DeepSpeed averages; with loss scaling, the scale contains it.
        self.backward_factor = 1 if engine.scaler.enabled else engine.layout.dp

    def stages(self) -> tuple[Sequence[int], Sequence[Stage]]:
        return [self.mesh.coordinates["pp"]], [self.engine.stage]

    def weights(self) -> Sequence[WeightShard]:
        return [
            WeightShard(
                shard.name,
                shard.flat.detach().narrow(0, shard.offset, shard.count),
                len(shard.part.shape),
                first=True,  # ZeRO shards over all data ranks
            )
            for shard in self.engine.shards
            if self.engine.owner(shard.name) == shard.name
        ]

    def watching(self, watcher: Watcher) -> AbstractContextManager[None]:
        return self.engine.watching(watcher)

    def before_update(self, call: Gradients) -> None:
        def before(found: dict[nn.Parameter, Tensor], excess: float) -> None:
            call(
                {
                    shard.name: found[shard.flat].narrow(0, shard.offset, shard.count)
                    for shard in self.engine.shards
                    if shard.flat in found
                },
                1 / excess,
            )

        self.engine.on_update(before)

    def wanted_update(self, name: str, before: Tensor) -> Tensor | None:  # noqa: ARG002
        """Master weights are fp32."""
        return None
