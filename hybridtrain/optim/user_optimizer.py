"""A user's optimizer (optim.kind=NAME), checked, stepped over this rank's shards, and saved like ours.

    factory(groups, optim config) -> torch.optim.Optimizer    groups of shards, with and without weight decay

Unscaling, clipping and skipping happen before its step. Only element-wise updates are the
same under every layout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hybridtrain import registry
from hybridtrain.config.schema import OptimConfig
from hybridtrain.errors import UserError, refusal
from hybridtrain.optim.shards import LocalShard, Update, groups, like, rest_of_division, set_rate

_NUMBERS: dict[str, tuple[type, torch.dtype]] = {
    "bool": (bool, torch.bool),
    "int": (int, torch.int64),
    "float": (float, torch.float64),
}
"""State values that are Python numbers. A checkpoint holds them as
tensors, with key `optim.<name>.<field>:<type>`."""


def build(parameters: list[dict[str, Any]], settings: OptimConfig) -> torch.optim.Optimizer:
    """The registered factory's optimizer.

    Raises UserError unless it has all parameters, each with the learning rate optim.lr.
    """
    optimizer = registry.call("optimizer", settings.kind, parameters, settings)
    if not isinstance(optimizer, torch.optim.Optimizer):
        problem, allowed = f"its factory returned {type(optimizer).__name__}", "a torch.optim.Optimizer"
        raise refusal(
            "optim.kind",
            settings.kind,
            problem,
            allowed=allowed,
            instead="a factory (groups, config) that returns one",
        )
    passed = [id(p) for group in parameters for p in group["params"]]
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    if sorted(passed) != sorted(held):
        problem, allowed = (
            f"it holds {len(held)} parameters of the {len(passed)} that it was given",
            "all of them, once each",
        )
        raise refusal(
            "optim.kind",
            settings.kind,
            problem,
            allowed=allowed,
            instead="model.freeze for what is not to be trained",
        )
    factors = {id(p): group.get("factor", 1.0) for group in parameters for p in group["params"]}
    for group in optimizer.param_groups:
        if any(factors[id(p)] != group.get("factor", 1.0) for p in group["params"]):
            raise refusal(
                "optim.rules",
                settings.rules,
                f"the groups that the factory of {settings.kind} makes leave out their rates",
                allowed="none with such an optimizer",
                instead="a factory that hands on the groups that it is given, or that copies their factor",
            )
        rate, expected = group.get("lr"), settings.lr * group.get("factor", 1.0)
        # a tensor has it in fp32
        if rate is None or not math.isclose(float(rate), expected, rel_tol=1e-6):
            problem, allowed = (
                f"one of its groups has the rate {rate}, optim.lr is {settings.lr:g}",
                "optim.lr, or that of optim.rules, in every group; the schedule multiplies it",
            )
            raise refusal(
                "optim.kind", settings.kind, problem, allowed=allowed, instead="lr=config.lr in its factory"
            )
    return optimizer


class UserOptimizer(Update):
    """A registered optimizer over local shards."""

    def __init__(self, shards: list[LocalShard], settings: OptimConfig):
        super().__init__(shards)
        self.kind = settings.kind
        self.optimizer = (
            build(
                groups([(item.name, item.parameter.dim(), item.shard) for item in shards], settings), settings
            )
            if shards
            else None
        )
        self._inside = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        """torch's name for kernels that unscale and skip themselves, so that the host need not
        wait for the device."""
        self._constants = self._group_settings()
        self._checked = False

    @torch.no_grad()
    def step(self, *, lr: float, divide: Tensor, skip: Tensor) -> None:
        """Update with gradients divided by `divide`; no update if `skip` is 1. Frees the gradients.

        Both are 0-d tensors.
        """
        if self.optimizer is None:
            return
        gradients = self.begin()
        set_rate(self.optimizer, lr)
        # Not in the first step: torch's fused SGD leaves momentum unset if it skips that.
        if self._inside and self.optimizer.state:
            divide = rest_of_division(gradients, divide)
            self.optimizer.grad_scale, self.optimizer.found_inf = divide, skip  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not skip:  # the host waits
            torch._foreach_div_(gradients, divide)
            self.optimizer.step()
        self.free()
        if not self._checked and self.optimizer.state:
            self._check()

    def state(self) -> dict[str, Tensor]:
        """State by key `optim.<name>.<field>`; empty before the first update."""
        result: dict[str, Tensor] = {}
        for item in self.shards:
            for field, value in self._state_of(item).items():
                if isinstance(value, Tensor):
                    result.setdefault(
                        f"optim.{item.name}.{field}",
                        value
                        if value.dim() == 0
                        else like(value, item.parameter, shape=item.parameter.shape),
                    )
                else:
                    name = type(value).__name__
                    result.setdefault(
                        f"optim.{item.name}.{field}:{name}", torch.tensor(value, dtype=_NUMBERS[name][1])
                    )
        return result

    def prepare(self, stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Allocate the state that a checkpoint holds. `stored`: key -> dtype and whole shape."""
        for item in self.shards:
            prefix = f"optim.{item.name}."
            for key in sorted(key for key in stored if key.startswith(prefix)):
                (dtype, shape), (field, _, number) = stored[key], key.removeprefix(prefix).partition(":")
                assert self.optimizer is not None
                if number:
                    value: Any = _NUMBERS[number][0]()
                elif not shape:
                    value = torch.zeros((), dtype=dtype, device=self._device(item))
                else:
                    value = torch.zeros_like(item.shard, dtype=dtype)
                self.optimizer.state[item.shard][field] = value

    def adopt(self, loaded: Mapping[str, Tensor]) -> None:
        """Set the Python numbers of the state from the tensors that a checkpoint was loaded into."""
        for item in self.shards:
            for field, value in self._state_of(item).items():
                if not isinstance(value, Tensor):
                    name = type(value).__name__
                    self._state_of(item)[field] = _NUMBERS[name][0](
                        loaded[f"optim.{item.name}.{field}:{name}"].item()
                    )

    def copy_state(self, source: LocalShard, target: LocalShard) -> None:
        """Give `target` the same state as `source` (the two copies of a tied matrix)."""
        for field, value in self._state_of(source).items():
            if isinstance(value, Tensor):
                self._state_of(target)[field].copy_(value)
            else:
                self._state_of(target)[field] = value

    def _state_of(self, item: LocalShard) -> dict[str, Any]:
        return self.optimizer.state.get(item.shard, {}) if self.optimizer else {}

    def _device(self, item: LocalShard) -> torch.device:
        """Device of 0-d state, as in torch's `load_state_dict`: the CPU, unless kernels on
        the device read it.
        """
        assert self.optimizer is not None
        [group] = [
            group for group in self.optimizer.param_groups if any(p is item.shard for p in group["params"])
        ]
        return item.shard.device if group.get("fused") or group.get("capturable") else torch.device("cpu")

    def _group_settings(self) -> list[dict[str, str]]:
        """The settings of each group, without the learning rate."""
        param_groups = self.optimizer.param_groups if self.optimizer else []
        return [
            {name: repr(value) for name, value in group.items() if name not in ("params", "lr")}
            for group in param_groups
        ]

    def _check(self) -> None:
        """Check after the first update that a checkpoint can restore the state under
        every layout (raises UserError).
        """
        assert self.optimizer is not None
        self._checked = True
        for before, now in zip(self._constants, self._group_settings(), strict=True):
            if changed := sorted(
                name for name in before.keys() | now.keys() if before.get(name) != now.get(name)
            ):
                raise self._refusal(
                    f"its group setting {changed[0]!r} changes from step to step, and is in no checkpoint"
                )
        ours = {id(item.shard) for item in self.shards}
        if any(id(key) not in ours for key in self.optimizer.state):
            raise self._refusal("it keeps state that belongs to no parameter")
        for item in self.shards:
            for field, value in self._state_of(item).items():
                if isinstance(value, Tensor) and (value.dim() == 0 or value.shape == item.shard.shape):
                    continue
                if type(value).__name__ in _NUMBERS and isinstance(field, str):
                    continue
                shape = (
                    f"has shape {tuple(value.shape)}, the parameter here {tuple(item.shard.shape)}"
                    if isinstance(value, Tensor)
                    else f"is {value!r}"
                )
                raise self._refusal(f"its state {field!r} of {item.name} {shape}")

    def _refusal(self, problem: str) -> UserError:
        allowed = "numbers, and tensors of the parameter's shape, in optimizer.state[parameter]"
        return refusal(
            "optim.kind",
            self.kind,
            problem,
            allowed=allowed,
            instead="an optimizer that updates element by element, such as optim=adamw",
        )
