"""What the numerics monitor needs of the torch engine (parallel/monitor.py)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from torch import Tensor

from hybridtrain.models.stage import Stage
from hybridtrain.optim.shards import local
from hybridtrain.parallel.mesh import sharded_over
from hybridtrain.parallel.monitor import Gradients, WeightShard
from hybridtrain.parallel.watch import Watcher

if TYPE_CHECKING:
    from hybridtrain.engine.torch_native import TorchEngine


class OfTorch:
    """See parallel.monitor.Monitored."""

    backward_factor = 1

    def __init__(self, engine: TorchEngine):
        self.engine, self.mesh, self.slicing = engine, engine.mesh, engine.slicing

    def stages(self) -> tuple[Sequence[int], Sequence[Stage]]:
        return self.engine.ids, self.engine.stages

    def weights(self) -> Sequence[WeightShard]:
        names = {name for stage in self.engine.stages for name, _ in stage.named_parameters()}
        return [
            WeightShard(
                name, local(weight).detach(), weight.dim(), first=self.mesh.is_first(sharded_over(weight))
            )
            for name, weight in self.engine.weights()
            if name in names  # a tied head elsewhere than the embedding is not counted
        ]

    def watching(self, watcher: Watcher) -> AbstractContextManager[None]:
        return self.engine.watching(watcher)

    def before_update(self, call: Gradients) -> None:
        def before() -> None:
            divide = self.engine.scaler.scale
            shards = self.engine.optimizer.shards
            call(
                {each.name: local(each.parameter.grad) for each in shards if each.parameter.grad is not None},
                divide,
            )

        self.engine.optimizer.watch.append(before)

    def wanted_update(self, name: str, before: Tensor) -> Tensor | None:
        optimizer = self.engine.optimizer
        item = next(each for each in optimizer.shards if each.name == name)
        wanted = optimizer.wanted(item, before=before.to(item.shard.device))
        return None if wanted is None else wanted.to(before.device)
