"""The update of one parameter in fp32 arithmetic (updates.py), over weights and moments that are stored in
other formats.

    state of a parameter              with
    step                              always; 0-d fp32, the number of updates
    exp_avg, exp_avg_sq, momentum     those that optim.kind keeps; 8bit: of vectors and small matrices
    exp_avg_codes, exp_avg_scales,    8bit (precision/eight_bit.py); rms is the root of exp_avg_sq
    rms_codes, rms_scales
    exp_avg_sq_row, exp_avg_sq_col    adafactor, of matrices; fp32 or fp64, whole on every rank (adafactor.py)
    exp_avg_sq                        adafactor, of others; fp32 or fp64
    compensation                      precision.rounding=kahan; int16, what the weight lacks (rounding.py)

The root is stored because the codes reach down to 3e-7 of a block's largest value. In exp_avg_sq that is a
gradient of 6e-4 of the largest one; below it, exp_avg would be divided by eps alone.

Plain tensors, whole or a rank's shard: element by element but for the blocks of 8 bits, which no shard cuts.
Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridtrain.config.schema import OptimConfig, PrecisionConfig
from hybridtrain.optim.shards import chunks, rows, wide
from hybridtrain.optim.updates import Moments, element, moments_of_kind
from hybridtrain.plan.optimizer_states import BLOCK, in_eight_bits
from hybridtrain.precision import eight_bit, rounding

CODED = ("exp_avg_codes", "exp_avg_scales", "rms_codes", "rms_scales")
COMPENSATION = "compensation"
ROW, COLUMN = FACTORS = ("exp_avg_sq_row", "exp_avg_sq_col")


@dataclass(frozen=True)
class Formats:
    """How weights and moments are stored, and the seed of stochastic rounding."""

    state: str
    rounding: str
    seed: int

    @classmethod
    def of(cls, precision: PrecisionConfig, *, seed: int) -> Formats:
        return cls(precision.state, precision.rounding, seed)

    def moments(self, weight: torch.dtype) -> torch.dtype:
        """dtype of moments that are not in 8 bits."""
        return {"auto": weight, "bf16": torch.bfloat16}.get(self.state, torch.float32)

    def rounds(self, weight: torch.dtype) -> str:
        """How weights of this dtype are rounded; empty if they are not."""
        return self.rounding if weight == torch.bfloat16 else ""

    def plain(self, weight: torch.dtype) -> bool:
        """Whether torch's own AdamW does the same."""
        same = self.state != "8bit" and self.moments(weight) == weight
        return same and self.rounds(weight) in ("", "nearest")


@dataclass(frozen=True)
class Place:
    """The place of a shard in its whole parameter, for random bits."""

    key: int
    first: Tensor
    """Index in the whole parameter of the first element of each row, int32 modulo 2^32, (rows, 1)."""


def place(shape: Sequence[int], slices: Sequence[slice], *, key: int, device: torch.device) -> Place:
    """The place of the elements in `slices` of a parameter of the whole `shape`."""
    first, stride = torch.zeros(1, dtype=torch.int64), 1
    for dim in reversed(range(len(shape))):
        part = slices[dim]
        ids = torch.arange(part.start, part.stop) if dim < len(shape) - 1 else torch.tensor([part.start])
        first, stride = (ids[:, None] * stride + first).flatten(), stride * shape[dim]
    return Place(key, first[:, None].to(torch.int32).to(device))


def allocate(
    weight: Tensor, *, whole: torch.Size, moments: Sequence[str], formats: Formats
) -> dict[str, Tensor]:
    """The state before the first update of `weight`, a shard of a parameter of the whole shape."""
    state = {"step": torch.zeros((), dtype=torch.float32, device=weight.device)}
    if formats.state == "8bit" and in_eight_bits(whole):
        for moment, signed in (("exp_avg", True), ("rms", False)):
            codes, scales = eight_bit.zeros(weight.shape, signed=signed, device=weight.device)
            state |= {f"{moment}_codes": codes, f"{moment}_scales": scales}
    else:
        dtype = formats.moments(weight.dtype)
        state |= {field: torch.zeros_like(weight, dtype=dtype) for field in moments}
    if formats.rounds(weight.dtype) == "kahan":
        state[COMPENSATION] = torch.zeros_like(weight, dtype=torch.int16)
    return state


def shape_of(field: str, shape: torch.Size) -> torch.Size:
    """Shape of a field of the state of a parameter, or (but for FACTORS) of a shard, of this shape."""
    if field == "step":
        return torch.Size()
    if field in FACTORS:
        return shape[:-1] if field == ROW else shape[:-2] + shape[-1:]
    return torch.Size((*shape[:-1], shape[-1] // BLOCK)) if field.endswith("_scales") else shape


def moments_of(state: Mapping[str, Tensor], names: Sequence[str]) -> Moments:
    """The moments of these names in fp32 or fp64; may share memory with the state."""
    if "rms_codes" not in state:
        return tuple(wide(state[name]) for name in names)
    first = eight_bit.decode(state["exp_avg_codes"], state["exp_avg_scales"], signed=True)
    return first, eight_bit.decode(state["rms_codes"], state["rms_scales"], signed=False).square()


def stored(moments: Moments, names: Sequence[str], *, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Moments in fp32 in the format of the state `like`."""
    if "rms_codes" not in like:
        return {name: moment.to(like[name].dtype) for name, moment in zip(names, moments, strict=True)}
    first, second = moments
    of_first, of_second = eight_bit.encode(first, signed=True), eight_bit.encode(second.sqrt(), signed=False)
    return dict(zip(CODED, (*of_first, *of_second), strict=True))


@torch.no_grad()
def update(
    weight: Tensor,
    gradient: Tensor,
    state: Mapping[str, Tensor],
    *,
    settings: OptimConfig,
    formats: Formats,
    where: Place | None,
    lr: float,
    decay: float,
    divide: Tensor,
    skip: Tensor,
) -> None:
    """One update in place, with the gradient divided by `divide`; nothing changes if `skip` is 1.

    Both are 0-d tensors. `where`: needed for stochastic rounding.
    """
    step = state["step"]
    step += 1 - skip
    if not weight.numel():
        return
    change, names = element(settings, step=step, lr=lr, decay=decay), moments_of_kind(settings)
    fields = {"weight": weight, **{field: state[field] for field in state if field != "step"}}
    in_rows = {field: rows(tensor) for field, tensor in fields.items()}
    gradients, keep = rows(gradient.contiguous()), skip > 0
    for part in chunks(gradients):
        now = {field: tensor[part] for field, tensor in in_rows.items()}
        scaled, old = wide(gradients[part]) / divide, wide(now["weight"])
        if COMPENSATION in now:
            old = rounding.joined(now["weight"], now[COMPENSATION])
        value, moments = change(old, scaled, moments_of(now, names))
        new = stored(moments, names, like=now)
        match formats.rounds(weight.dtype):
            case "kahan":
                new["weight"], new[COMPENSATION] = rounding.split(value)
            case "stochastic":
                assert where is not None
                columns = torch.arange(gradients.shape[1], dtype=torch.int32, device=weight.device)
                index = where.first[part] + columns
                bits = rounding.random_bits(index, key=where.key, step=step)
                new["weight"] = rounding.round_stochastically(value, bits)
            case _:
                new["weight"] = value.to(weight.dtype)
        for field, value in new.items():
            now[field].copy_(torch.where(keep, now[field], value))
