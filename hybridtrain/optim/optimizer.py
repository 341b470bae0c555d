"""Parameter groups and the optimizer.

The optimizer works on each rank's local shards (`Local`), not on DTensors: one fused call whatever the mesh, with clipping,
unscaling and skipped steps inside the kernel (the `grad_scale` and `found_inf` that GradScaler hands to it).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hybridtrain.config.schema import OptimConfig
from hybridtrain.models.patterns import matches


@dataclass(frozen=True)
class Local:
    """One trained parameter: its name, the parameter the model uses, and a view of this rank's shard that the optimizer updates."""

    name: str
    parameter: nn.Parameter
    shard: nn.Parameter


def local_shards(named: Iterable[tuple[str, nn.Parameter]]) -> list[Local]:
    """Shards of the parameters that require gradients, sharing memory with them."""
    result = []
    for name, parameter in named:
        if parameter.requires_grad:
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            result.append(Local(name, parameter, nn.Parameter(local.detach())))
    return result


class AdamW:
    """Fused AdamW over local shards (Decoupled Weight Decay Regularization, arXiv 1711.05101)."""

    def __init__(self, shards: list[Local], settings: OptimConfig):
        self.shards = shards
        decays = [item.parameter.dim() > 1 and not matches(item.name, settings.no_decay) for item in shards]
        self.optimizer = _adamw([item.shard for item in shards], decays, settings) if shards else None

    @torch.no_grad()
    def step(self, *, lr: float, divide: Tensor, skip: Tensor) -> None:
        """Update with gradients divided by `divide`; do nothing where `skip` is 1. Frees the gradients."""
        if self.optimizer is None:
            return
        for item in self.shards:
            grad = item.parameter.grad
            item.shard.grad = grad.to_local() if isinstance(grad, DTensor) else grad
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.grad_scale, self.optimizer.found_inf = divide, skip  # type: ignore[attr-defined]
        self.optimizer.step()
        for item in self.shards:
            item.parameter.grad = item.shard.grad = None

    def state(self) -> dict[str, Tensor]:
        """Optimizer state under `optim.<name>.<field>`, as DTensors where the parameter is one; created if not there yet."""
        assert self.optimizer is not None or not self.shards
        result: dict[str, Tensor] = {}
        for item in self.shards:
            state = self.optimizer.state[item.shard]  # type: ignore[union-attr]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=item.shard.device)
                state["exp_avg"] = torch.zeros_like(item.shard.data)
                state["exp_avg_sq"] = torch.zeros_like(item.shard.data)
            for field, value in state.items():
                # The first of two copies of a tied matrix speaks for both, as it does for the weight itself.
                result.setdefault(f"optim.{item.name}.{field}", value if field == "step" else _like(value, item.parameter))
        return result

    def copy_state(self, source: Local, target: Local) -> None:
        """Give `target` the same state as `source` (the two copies of a tied matrix)."""
        assert self.optimizer is not None
        for field, value in self.optimizer.state[source.shard].items():
            self.optimizer.state[target.shard][field].copy_(value)


def adamw(named: list[tuple[str, int, nn.Parameter]], settings: OptimConfig) -> torch.optim.AdamW:
    """torch's fused AdamW over (name, dimensions, parameter), for an engine that shards parameters by itself."""
    decays = [dimensions > 1 and not matches(name, settings.no_decay) for name, dimensions, _ in named]
    return _adamw([parameter for _, _, parameter in named], decays, settings)


def _adamw(parameters: list[nn.Parameter], decays: list[bool], settings: OptimConfig) -> torch.optim.AdamW:
    """Two groups: with weight decay and without."""
    first, second = settings.betas
    groups = [
        {"params": [p for p, decay in zip(parameters, decays, strict=True) if decay], "weight_decay": settings.weight_decay},
        {"params": [p for p, decay in zip(parameters, decays, strict=True) if not decay], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, betas=(first, second), eps=settings.eps, fused=True)


def build(shards: list[Local], settings: OptimConfig) -> AdamW:
    """The optimizer that optim.kind names."""
    match settings.kind:
        case "adamw":
            return AdamW(shards, settings)
    raise AssertionError(f"optim.kind={settings.kind} was not checked")


def _like(local: Tensor, parameter: nn.Parameter) -> Tensor:
    """A DTensor over `local`, placed as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return local
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())
