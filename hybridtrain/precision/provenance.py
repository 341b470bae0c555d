"""Finds where a non-finite number began: the first module, in the order of the computation, whose inputs are
finite and whose output is not; or in the backward pass, whose output gradient is finite and whose input or
parameter gradient is not.

    replay of the step --Recorder (parallel/watch.py)--> numbers on the device --signs--> this rank's first
    signs of all ranks --origin--> the earliest of all, with its ties --Origin.text, .advice--> people

Order: forward before backward, then micro-batch, stage, and execution within the stage; in the backward pass
the last stage and the last call come first. A weight, an activation or a row is non-finite before its
consequences are, so the earliest is the cause.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hybridtrain.precision.round import dtype_of

if TYPE_CHECKING:
    from hybridtrain.parallel.watch import Call

_SHOWN = 4
"""Ranks or rows that a text names before "and N more"."""
_PLACES = {
    "weight": "its weight is not finite",
    "output": "its output is not finite, its inputs are",
    "loss": "the loss is not finite, its hidden states are",
    "input": "its input is not finite: a sum or product between it and {before}",
    "gradient": "in the backward pass its input gradient is not finite, its output gradient is",
    "parameter": "in the backward pass the gradient of its weight is not finite, its output gradient is",
    "arriving": "in the backward pass its output gradient is not finite: "
    "a sum or product between it and {before}",
}
"""Kind of a sign -> words."""


@dataclass(frozen=True)
class Row:
    """A row of a micro-batch, as the data know it."""

    corpus: str
    row: int
    """In the corpus."""
    documents: tuple[int, ...]
    """Numbers in the token file, from 0; empty if the data have no documents."""

    def __str__(self) -> str:
        first, *others = self.documents or (None,)
        of = f"document {first}" if not others else f"documents {first} to {others[-1]}"
        return f"row {self.row} of {self.corpus}" + ("" if first is None else f" ({of})")


@dataclass(frozen=True)
class Sign:
    """The first non-finite number of a rank."""

    kind: str
    """A key of _PLACES."""
    micro_batch: int
    stage: int
    call: int
    """Place in the stage's forward pass."""
    module: str
    before: str
    """The module that was computed before it, whose results are finite."""
    rows: tuple[int, ...]
    """Rows of the micro-batch with such numbers; empty if they cannot be told apart."""
    size: int
    """Rows of the micro-batch."""
    amax: float | None
    """Largest finite magnitude of its inputs, or in the backward pass of its output gradient; None: it was
    given integers."""
    dtype: torch.dtype
    """Of its output, or of its output gradient; of a linear layer's products, if they have their own."""
    format: str
    """The format of a linear layer's products, where precision.compute or a rule gives one; else empty."""

    @property
    def backward(self) -> bool:
        return self.kind in ("gradient", "parameter", "arriving")

    @property
    def order(self) -> tuple[int, ...]:
        forth = -1 if self.backward else 1
        return (int(self.backward), self.micro_batch, forth * self.stage, forth * self.call)


@dataclass(frozen=True)
class Found:
    """A sign with its rank, and the rows as the data know them."""

    sign: Sign
    rank: int
    coordinates: Mapping[str, int]
    """Axis -> coordinate, for axes of a degree above 1."""
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        axes = ", ".join(f"{axis} {at}" for axis, at in self.coordinates.items())
        return f"rank {self.rank}" + (f" ({axes})" if axes else "")


@dataclass(frozen=True)
class Origin:
    """Where the non-finite numbers of a step began. The same on all ranks."""

    found: tuple[Found, ...]
    """Ties, in the order of ranks: tensor-parallel ranks, or data ranks at the same place. Empty: no module
    shows one."""
    again: bool
    """Whether loss or gradients were not finite in the replay either."""
    exact: bool
    """Whether the weights were those of the step; else an update was made before its numbers were read."""

    @property
    def text(self) -> str:
        """One line."""
        late = "" if self.exact else " (in a replay one update later)"
        if not self.again:
            return f"it did not come again when the step was repeated{late}"
        if not self.found:
            return f"no module shows it: the sum of squares of the gradients is too large for fp32{late}"
        sign = self.found[0].sign
        nothing = "the loss" if sign.backward else "the stage's input"
        where = _PLACES[sign.kind].format(before=sign.before or nothing)
        parts = [f"{sign.module}: {where}"]
        parts.append(f"micro-batch {sign.micro_batch}, {_some([str(found) for found in self.found])}")
        if rows := [str(row) for found in self.found for row in found.rows]:
            parts.append(_some(list(dict.fromkeys(rows))))
        if sign.before and sign.before not in where:
            parts.append(f"last finite {sign.before}")
        if sign.amax is not None:
            what = "output gradient" if sign.backward else "input"
            ends = f"{str(sign.dtype).removeprefix('torch.')} ends at {torch.finfo(sign.dtype).max:.6g}"
            parts.append(f"largest finite {what} {sign.amax:.4g}, {ends}")
        return "; ".join(parts) + late

    @property
    def advice(self) -> str:
        """What to try."""
        if not self.again:
            return (
                "the same command again: a number that does not come again is a fault of the hardware "
                "or of a kernel; if it returns, another machine"
            )
        if not self.found:
            return "a lower optim.lr, a longer schedule.warmup_steps"
        sign = self.found[0].sign
        if sign.kind == "weight":
            return "an earlier checkpoint (run.branch_from=CHECKPOINT): no step can repair a weight"
        few = any(found.rows for found in self.found) and (len(sign.rows) < sign.size or sign.size == 1)
        rows = "look at these rows (train.on_nonfinite=rollback leaves them out); " if few else ""
        if sign.dtype == torch.float16 and sign.format and not sign.backward:
            rule = f"precision.rules=[{{match: '{sign.module}', compute: high}}]"
            return f"{rows}{rule}, or precision.adaptive=true: fp16 ends at 65504"
        if sign.dtype == torch.float16:
            return rows + (
                "a lower loss scale: of a static one a lower precision.static_scale, or "
                "precision.static_scale=null; else a lower precision.min_scale and precision.init_scale"
                if sign.backward
                else "precision=bf16_mixed: fp16 ends at 65504, and no loss scale changes the forward pass"
            )
        return f"{rows}a lower optim.lr, optim.clip=1.0, a longer schedule.warmup_steps"


def origin(found: Sequence[Found], *, again: bool, exact: bool) -> Origin:
    """The earliest of the signs of all ranks, with its ties; of those, ranks with a non-finite weight alone,
    since their sum makes the others' non-finite too."""
    first = min((each.sign.order for each in found), default=None)
    ties = [each for each in found if each.sign.order == first]
    weights = [each for each in ties if each.sign.kind == "weight"]
    return Origin(tuple(weights or ties), again, exact)


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


@dataclass(frozen=True)
class _Seen:
    """What is known of one tensor; on the device."""

    bad: Tensor
    """bool (B,): whether a row has a non-finite number; (1,) where rows cannot be told apart."""
    amax: Tensor
    """Largest finite magnitude, 0-d."""
    dtype: torch.dtype


class Recorder:
    """Records, for each call of a module, which of its tensors are finite. See parallel/watch.py, Watcher.

    Nothing waits for the device before `sign`.
    """

    inputs = True

    def __init__(self, rows: Sequence[tuple[int, int]]):
        """`rows`: (rows, positions) of each micro-batch."""
        self._rows = rows
        self._calls: dict[tuple[int, int, int], tuple[Call, dict[str, list[_Seen]]]] = {}

    def forward(self, call: Call, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        for role, tensors in (("x", inputs), ("y", outputs)):
            self._add(call, role, *tensors)
        weights = [parameter.detach() for parameter in call.module.parameters(recurse=False)]
        self._add(call, "w", *(w.to_local() if hasattr(w, "to_local") else w for w in weights))

    def output_gradient(self, call: Call, gradient: Tensor) -> None:
        self._add(call, "dy", gradient)

    def input_gradient(self, call: Call, gradient: Tensor) -> None:
        self._add(call, "dx", gradient)

    def parameter_gradient(self, call: Call, gradient: Tensor) -> None:
        self._add(call, "dw", gradient)

    def row_losses(self, call: Call, sums: Tensor) -> None:
        self._add(call, "rows", sums)

    def sign(self) -> Sign | None:
        """The first non-finite number of this rank; None if there is none. One copy from the device."""
        seen = [one for _, roles in self._calls.values() for each in roles.values() for one in each]
        if not seen:
            return None
        numbers = iter(torch.cat([x for one in seen for x in (one.amax[None], one.bad.float())]).tolist())
        host = {
            id(one): _OnHost(next(numbers), [row for row in range(len(one.bad)) if next(numbers)], one)
            for one in seen
        }
        calls = [
            _Call(
                call,
                self._rows[call.micro_batch][0],
                {role: [host[id(one)] for one in each] for role, each in roles.items()},
            )
            for call, roles in self._calls.values()
        ]
        forward = sorted(calls, key=lambda each: (each.call.micro_batch, each.call.stage, each.call.order))
        backward = sorted(calls, key=lambda each: (each.call.micro_batch, -each.call.stage, -each.call.order))
        return _first(forward, _Call.in_forward) or _first(backward, _Call.in_backward)

    def _add(self, call: Call, role: str, *tensors: Tensor) -> None:
        key = (call.stage, call.micro_batch, call.order)
        _, roles = self._calls.setdefault(key, (call, {}))
        size, positions = self._rows[call.micro_batch]
        for tensor in tensors:
            if tensor.numel():
                by_row = (
                    role not in ("w", "dw")
                    and tensor.dim() > 1
                    and tensor.shape[0] in (size, size * positions)
                )
                roles.setdefault(role, []).append(_seen(tensor, rows=size if by_row else 1))


@torch.no_grad()
def _seen(tensor: Tensor, *, rows: int) -> _Seen:
    finite = torch.isfinite(tensor)
    amax = torch.where(finite, tensor, 0).abs().amax().float()
    return _Seen(~finite.reshape(rows, -1).all(1), amax, tensor.dtype)


@dataclass(frozen=True)
class _OnHost:
    """_Seen, read."""

    amax: float
    bad: list[int]
    seen: _Seen


@dataclass(frozen=True)
class _Call:
    """A call of a module in a micro-batch of `size` rows, with its tensors by role: x inputs, y outputs, w
    weights, dx, dy, dw their gradients, rows the losses of rows."""

    call: Call
    size: int
    roles: Mapping[str, Sequence[_OnHost]]

    def has(self, role: str) -> bool:
        """Whether one of these tensors has a non-finite number."""
        return any(one.bad for one in self.roles.get(role, ()))

    def in_forward(self) -> Sign | None:
        """What begins in this call of the forward pass."""
        if not self.has("y"):
            return None
        if self.has("w"):
            return self._sign("weight", rows="y", given="x", of="y")
        if self.has("x"):
            return self._sign("input", rows="x", given="x", of="x")
        if "rows" in self.roles:
            return self._sign("loss", rows="rows", given="x", of="x")
        return self._sign("output", rows="y", given="x", of="y")

    def in_backward(self) -> Sign | None:
        """What begins in this call of the backward pass."""
        if self.has("dy"):
            return self._sign("arriving", rows="dy", given="dy", of="dy")
        if self.has("dx"):
            return self._sign("gradient", rows="dx", given="dy", of="dx")
        return self._sign("parameter", rows="dw", given="dy", of="dw") if self.has("dw") else None

    def _sign(self, kind: str, *, rows: str, given: str, of: str) -> Sign:
        """`rows`, `given`, `of`: roles that tell the rows, the magnitude and the dtype."""
        by_row = [one for one in self.roles.get(rows, ()) if len(one.seen.bad) == self.size]
        bad = {row for one in by_row for row in one.bad}
        c = self.call
        amax = max((one.amax for one in self.roles.get(given, ())), default=None)
        dtype, name = (self.roles.get(of) or self.roles["y"])[0].seen.dtype, ""
        product = getattr(c.module, "product", None)
        if product is not None and kind in ("output", "gradient", "parameter"):
            name = product.format.name
            if not product.format.scale:  # with a scale, products are in the dtype of the output
                dtype = dtype_of(product.format.x)
        rows_ = tuple(sorted(bad))
        return Sign(kind, c.micro_batch, c.stage, c.order, c.name, "", rows_, self.size, amax, dtype, name)


def _first(calls: Sequence[_Call], begins: Callable[[_Call], Sign | None]) -> Sign | None:
    """The sign of the first of these calls that has one, with the call before it."""
    for index, each in enumerate(calls):
        sign = begins(each)
        if sign is not None:
            last = calls[index - 1].call if index else None
            here = last is not None and (last.micro_batch, last.stage) == (sign.micro_batch, sign.stage)
            return replace(sign, before=last.name if last is not None and here else "")
    return None
