"""Parameters that several pipeline stages hold: a matrix that ties embedding and head, and modules before the
layers that every stage runs (Structure.shared).

Each copy gets the gradient of its own stage. Their sum is the gradient of the parameter, so that all copies
get the same update; in the gradient norm and in checkpoints the parameter is there once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from hybridtrain.models.stage import Stage
from hybridtrain.optim.shards import Update, wide
from hybridtrain.parallel.grad_norm import local_part
from hybridtrain.parallel.mesh import Mesh
from hybridtrain.plan.schedules import stage_ids


def stages_of(stage: Stage, *, count: int) -> dict[str, tuple[int, ...]]:
    """Name -> numbers of the stages that hold it, of every parameter that more than one of `count` stages do.

    The same for each stage of a model.
    """
    if count == 1:
        return {}
    structure = stage.structure
    result: dict[str, tuple[int, ...]] = {}
    if stage.tied:
        result[f"{structure.embed}.weight"] = (0, count - 1)
    for path in structure.shared:
        for name, _ in stage.part(path).named_parameters(prefix=path):
            result[name] = tuple(range(count))
    return result


class Shared:
    """The copies of shared parameters on this rank."""

    def __init__(self, stages: Sequence[Stage], *, count: int, schedule: str, mesh: Mesh):
        """Creates process groups (collective). `count`: stages of the pipeline."""
        self.stages = stages
        self.held = stages_of(stages[0], count=count)
        pp = mesh.layout.pp
        placed = [set(stage_ids(rank, pp=pp, per_rank=count // pp, schedule=schedule)) for rank in range(pp)]
        ranks = {
            name: tuple(rank for rank, ids in enumerate(placed) if ids & set(held))
            for name, held in self.held.items()
        }
        groups = {key: self._group(key, mesh=mesh) for key in dict.fromkeys(ranks.values())}
        self.groups: Mapping[str, dist.ProcessGroup | None] = {
            name: groups[key] for name, key in ranks.items()
        }
        """Name -> the ranks of this rank's pipeline that hold it; None for one rank."""

    @staticmethod
    def _group(ranks: tuple[int, ...], *, mesh: Mesh) -> dist.ProcessGroup | None:
        if len(ranks) == 1:
            return None
        if len(ranks) == mesh.layout.pp:
            return mesh.group("pp")
        assert ranks == (0, mesh.layout.pp - 1), f"no group of the pipeline ranks {ranks}"
        return mesh.embedding_group()

    def copies(self) -> dict[str, list[nn.Parameter]]:
        """Name -> this rank's copies, that of the first stage first."""
        result: dict[str, list[nn.Parameter]] = {}
        for stage in self.stages:
            for name, parameter in stage.named_parameters():
                if (owner := stage.owner(name)) in self.held:
                    result.setdefault(owner, []).append(parameter)
        return {name: result[name] for name in self.held if name in result}

    def counted(self) -> list[nn.Parameter]:
        """This rank's trainable parameters, without copies of those of another stage: they count once."""
        return [
            parameter
            for stage in self.stages
            for name, parameter in stage.named_parameters()
            if parameter.requires_grad and (stage.first or stage.owner(name) not in self.held)
        ]

    @torch.no_grad()
    def copy(self, optimizer: Update) -> None:
        """Copy the first of this rank's copies, and its moments, to the others: a checkpoint has one."""
        for first, *others in self.copies().values():
            for other in others:
                local_part(other).copy_(local_part(first))
        for name in self.held:
            shards = [shard for shard in optimizer.shards if shard.name == name]
            for shard in shards[1:]:
                optimizer.copy_state(shards[0], shard)


@torch.no_grad()
def add_shared_gradients(shared: Shared) -> None:
    """Replace the gradients of all copies of a shared parameter by their sum (collective)."""
    for name, copies in shared.copies().items():
        if not copies[0].requires_grad:
            continue
        for copy in copies:
            if copy.grad is None:  # no layer of its stage depends on it
                copy.grad = torch.zeros_like(copy)
        gradients = [local_part(copy.grad) for copy in copies]
        total = wide(gradients[0])
        for other in gradients[1:]:
            total += other
        if (group := shared.groups[name]) is not None:
            dist.all_reduce(total, group=group)
        for gradient in gradients:
            gradient.copy_(total)
