"""The state of built-in optimizers in checkpoints, also in those that hold the moments in another format.

prepare   moments in another format get tensors of their own, which `state` then returns
adopt     after loading, they are converted, one parameter at a time
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hybridtrain.config.schema import OptimConfig
from hybridtrain.optim import stored as formats
from hybridtrain.optim.shards import LocalShard, Update, decay_of, like, rate_of, rows
from hybridtrain.optim.stored import CODED, COMPENSATION, FACTORS
from hybridtrain.optim.updates import moments_of_kind
from hybridtrain.precision.rounding import joined, split

Fields = dict[str, Tensor]
_WEIGHT = "weight"
"""Among the fields of a parameter while it is loaded: fp32, of which bf16 and compensation are made."""


class BuiltIn(Update):
    """Base class of optimizers whose state of a parameter is that of stored.py."""

    def __init__(self, shards: list[LocalShard], settings: OptimConfig):
        super().__init__(shards)
        self.settings, self.lr = settings, 0.0
        """`lr`: of the last step."""
        self._loading: dict[Tensor, Fields] = {}
        """Shard -> the fields that a checkpoint holds, while it is loaded."""

    def fields(self, item: LocalShard) -> Fields:
        """The state of a parameter on this rank, allocated if need be."""
        raise NotImplementedError

    def settings_of(self, item: LocalShard) -> OptimConfig:  # noqa: ARG002
        """The settings of the update of a parameter."""
        return self.settings

    def moments(self, item: LocalShard) -> Sequence[str]:
        """The fields of its state that are as large as a parameter."""
        return moments_of_kind(self.settings_of(item))

    @torch.no_grad()
    def wanted(self, item: LocalShard, *, before: Tensor) -> Tensor | None:
        state, settings = self.fields(item), self.settings_of(item)
        if COMPENSATION in state:  # it keeps what rounding cuts off
            return None
        if settings.kind != "adamw":  # theirs follows from the gradient, which is gone
            return None
        beta1, beta2 = settings.betas
        first, second = formats.moments_of(state, self.moments(item))
        mean = first / (1 - beta1 ** state["step"])
        deviation = (second / (1 - beta2 ** state["step"])).sqrt()
        decay = decay_of(item.name, item.parameter.dim(), settings=settings)
        lr = self.lr * rate_of(item.name, settings=settings)
        return -lr * (mean / (deviation + settings.eps) + decay * before.float())

    def exact(self, item: LocalShard, part: slice) -> Tensor:
        rest = self.fields(item).get(COMPENSATION)
        if rest is None:
            return super().exact(item, part)
        return joined(rows(item.shard.detach())[part], rows(rest)[part])

    def state(self) -> dict[str, Tensor]:
        """Optimizer state by key `optim.<name>.<field>`, as DTensors where the parameter is one."""
        result: dict[str, Tensor] = {}
        for item in self.shards:
            for field, value in (self._loading.get(item.shard) or self.fields(item)).items():
                shape = formats.shape_of(field, item.parameter.shape)
                whole = field == "step" or field in FACTORS
                # Of the two copies of a tied matrix the first is saved, as for the weight itself.
                result.setdefault(
                    f"model.{item.name}" if field == _WEIGHT else f"optim.{item.name}.{field}",
                    value if whole else like(value, item.parameter, shape=shape),
                )
        return result

    def copy_state(self, source: LocalShard, target: LocalShard) -> None:
        """Give `target` the same state as `source` (the two copies of a tied matrix)."""
        for field, value in self.fields(source).items():
            self.fields(target)[field].copy_(value)

    def prepare(self, stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Called before a checkpoint is loaded. `stored`: key -> dtype and whole shape."""
        for item in self.shards:
            own, moments = self.fields(item), self.moments(item)
            fixed = own.keys() - {"step", *moments, *CODED, COMPENSATION}
            dtypes = {
                field: stored[key][0]
                for field in ("step", *moments, *CODED, COMPENSATION)
                if (key := f"optim.{item.name}.{field}") in stored
            }
            none = dtypes.keys() <= {"step", COMPENSATION} and "step" in dtypes  # of a run without momentum
            known = none or dtypes.keys() >= set(moments) or dtypes.keys() >= set(CODED)
            if known and dtypes.keys() | fixed != own.keys():
                self._loading[item.shard] = {field: own[field] for field in fixed} | {
                    field: own[field]
                    if field in own
                    else item.shard.new_zeros(formats.shape_of(field, item.shard.shape), dtype=dtype)
                    for field, dtype in dtypes.items()
                }
                of_weight = stored.get(f"model.{item.name}", (item.shard.dtype,))[0]
                if COMPENSATION in own and COMPENSATION not in dtypes and of_weight == torch.float32:
                    self._loading[item.shard][_WEIGHT] = item.shard.new_zeros(
                        item.shard.shape, dtype=of_weight
                    )

    @torch.no_grad()
    def adopt(self, loaded: Mapping[str, Tensor]) -> None:  # noqa: ARG002 - they were loaded in place
        """Called after a checkpoint was loaded into the tensors of `state`."""
        for item in self.shards:
            if (read := self._loading.pop(item.shard, None)) is None:
                continue
            own, moments = self.fields(item), self.moments(item)
            held = read.keys() & {*moments, *CODED}
            if not held:
                for field in own.keys() & {*moments, *CODED}:
                    own[field].zero_()
            elif own.keys().isdisjoint(held):
                values = formats.moments_of(read, moments)
                for field, value in formats.stored(values, moments, like=own).items():
                    own[field].copy_(value)
            if _WEIGHT in read:
                for target, part in zip((item.shard, own[COMPENSATION]), split(read[_WEIGHT]), strict=True):
                    target.copy_(part)
            elif COMPENSATION in own and COMPENSATION not in read:
                own[COMPENSATION].zero_()
            elif COMPENSATION in read and COMPENSATION not in own:
                item.shard.copy_(joined(item.shard.bfloat16(), read[COMPENSATION]))
