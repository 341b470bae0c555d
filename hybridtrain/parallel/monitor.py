"""The numerics monitor: exponent histograms and a few figures of what every module computes in a sampled
step, and of every update.

    with monitor.sampling(step):          hooks only in steps that are sampled
        result = engine.train_step(...)
    monitor.sample(result)                one sum and one maximum over all ranks, then to the host

Everything is a sum, or a maximum, over micro-batches and ranks: bit-equal histograms under pipelines, ZeRO
and recomputation. Nothing waits for the device before `sample`. A tensor is read three times: for its
histogram, its largest magnitude and its sum of squares; every 16th row of the first micro-batch once more,
for the signal-to-noise ratio.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hybridtrain.config.schema import PrecisionConfig
from hybridtrain.models.patterns import check_one, matches
from hybridtrain.models.slicing import Slicing
from hybridtrain.models.stage import Stage
from hybridtrain.parallel.mesh import Mesh
from hybridtrain.parallel.operands import Counted, counted, own_part
from hybridtrain.parallel.watch import Call, Watcher
from hybridtrain.plan.formats import NUMBERS
from hybridtrain.precision.histogram import BINS
from hybridtrain.precision.numerics import ROLES, SNR_BINS, Sample, Statistics, Update, formats_of, median_snr
from hybridtrain.precision.round import round_to
from hybridtrain.types import StepResult

_ROWS = 16
"""The signal-to-noise ratio is that of every 16th row: +4 % on a sampled step in bf16, all rows +346 %."""
_SQUARES, _SNR = BINS, BINS + 1
_WIDTH = BINS + 1 + SNR_BINS
_FIGURES = ("gradient", "weight", "update", "wanted", "product", "unchanged", "count")
"""Sums of a parameter: squares of gradient, weights, update and the update before rounding; the product of
those two; weights that the update should have changed, but did not; weights."""


@dataclass(frozen=True)
class WeightShard:
    """This rank's shard of a parameter, as the optimizer updates it."""

    name: str
    weight: Tensor
    dims: int
    """Dimensions of the whole parameter; the shard may be flat."""
    first: bool
    """Whether this rank counts it: the first of those that have the same part."""


Gradients = Callable[[Mapping[str, Tensor], Tensor | float], None]
"""(parameter -> this rank's shard of the reduced gradient, what to divide it by)."""


class Monitored(Protocol):
    """What the monitor needs of an engine."""

    mesh: Mesh
    slicing: Slicing
    backward_factor: int
    """Factor, besides the loss scale, of gradients inside the backward pass."""

    def stages(self) -> tuple[Sequence[int], Sequence[Stage]]:
        """(numbers in the whole model, stages) of this rank."""

    def weights(self) -> Sequence[WeightShard]:
        """This rank's shards; each parameter that several stages have is among those of one."""

    def watching(self, watcher: Watcher) -> AbstractContextManager[None]: ...

    def before_update(self, call: Gradients) -> None:
        """Call in the next step between backward pass and update; with some of the parameters at a time, if
        they are updated so.
        """

    def wanted_update(self, name: str, before: Tensor) -> Tensor | None:
        """After an update: what this rank's shard of a parameter should have changed by, fp32; None if the
        optimizer cannot say. `before`: its weights before.
        """


class Monitor:
    """Samples steps of an engine; a Watcher. Collective: every rank makes the same calls."""

    inputs = False

    def __init__(
        self, engine: Monitored, *, every: int, patterns: Sequence[str], precision: PrecisionConfig
    ) -> None:
        """`every`: steps between samples; `patterns`: of the modules to watch. Raises UserError for one that
        matches no module.
        """
        self.engine, self.every, self.mesh = engine, every, engine.mesh
        self.again = False
        """Whether to sample the next step too."""
        self.step = 0
        """The step that was sampled last."""
        self.formats = formats_of(precision)
        numbers, stages = engine.stages()
        every_one = {
            (number, path): each
            for number, stage in zip(numbers, stages, strict=True)
            for path, each in _modules(stage, engine).items()
        }
        self.names = _of_all_stages(list(every_one), patterns=patterns)
        self.counted = {key: each for key, each in every_one.items() if key[1] in self.names}
        own = {path for _, path in self.counted}
        self.shards = [each for each in engine.weights() if each.name.rpartition(".")[0] in own]
        self.parameters = _rows([each.name for each in self.shards], modules=self.names)
        self.rows = {
            key: row for row, key in enumerate((module, role) for module in self.names for role in ROLES)
        }
        device = engine.mesh.device
        self.sums = torch.zeros(len(self.rows), _WIDTH, dtype=torch.float64, device=device)
        self.figures = torch.zeros(len(self.parameters), len(_FIGURES), dtype=torch.float64, device=device)
        self.amax = torch.zeros(len(self.rows), device=device)
        self.tops = torch.zeros_like(self.amax)
        """Largest magnitudes of the last sample, over all ranks."""
        self._before: list[tuple[WeightShard, Tensor]] = []
        self._shapes: dict[tuple[int, str], torch.Size] = {}
        """Of the first output of each module."""
        self._heads: list[Tensor] = []
        """The last key and value heads that other ranks have too."""
        self._repeated: set[str] = set()
        """Norms of such heads, which another rank counts."""

    def due(self, step: int) -> bool:
        """Whether step `step`, counted from 1, is sampled."""
        return self.again or step == 1 or step % self.every == 0

    @contextlib.contextmanager
    def sampling(self, step: int) -> Iterator[None]:
        """Around step `step`; does nothing if it is not due."""
        if not self.due(step):
            yield
            return
        self.again = False
        for total in (self.sums, self.figures, self.amax):
            total.zero_()
        self._weights()
        self.engine.before_update(self._gradients)
        with self.engine.watching(self):
            yield
        self._updates()
        self._heads.clear()
        self.step = step

    # -- what modules compute
    # ---------------------------------------------------------------------------------------

    def forward(self, call: Call, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        each = self.counted.get((call.stage, call.name))
        if each is None:
            return
        if inputs and each.of_heads and self._are_shared(inputs[0]):
            self._repeated.add(call.name)
        if inputs and call.name not in self._repeated:
            self._add(call.name, "x", own_part(inputs[0], each.x), snr=call.micro_batch == 0)
        if outputs:
            self._shapes[call.stage, call.name] = outputs[0].shape
        if outputs and each.y:
            row = self.rows[call.name, "y"]
            torch.maximum(self.amax[row], _amax(outputs[0]), out=self.amax[row])
        if each.heads_shared:
            self._heads = [*self._heads[-1:], *outputs]  # held, so that nothing else gets their memory

    def output_gradient(self, call: Call, gradient: Tensor) -> None:
        each = self.counted.get((call.stage, call.name))
        first = self._shapes.get((call.stage, call.name))  # others are by-products, such as attention scores
        if each is not None and gradient.shape == first and call.name not in self._repeated:
            if (factor := self.engine.backward_factor) != 1:
                gradient = gradient / factor
            self._add(call.name, "g", own_part(gradient, each.g), snr=call.micro_batch == 0)

    def input_gradient(self, call: Call, gradient: Tensor) -> None:  # noqa: ARG002
        raise AssertionError("not asked for")

    parameter_gradient = row_losses = input_gradient

    def _are_shared(self, heads: Tensor) -> bool:
        """Whether they are a result that other ranks have too."""
        memory = heads.untyped_storage().data_ptr()
        return any(each.untyped_storage().data_ptr() == memory for each in self._heads)

    @torch.no_grad()
    def _add(self, name: str, role: str, parts: Sequence[Tensor], *, snr: bool) -> None:
        row = self.rows[name, role]
        for part in parts:
            if not part.numel():
                continue
            amax = _amax(part)
            torch.maximum(self.amax[row], amax, out=self.amax[row])
            self.sums[row, :BINS] += _histogram(part)
            self.sums[row, _SQUARES] += _norms([part])[0].square()
            if snr:
                matrix = part.reshape(-1, part.shape[-1])[::_ROWS].float()
                # With a part of an operand, its scale is not known: that of the last sample will do.
                cut = self.mesh.layout.tp > 1 or role == "w"
                top = torch.maximum(amax, self.tops[row]) if cut else amax
                channels = matrix.t() if role == "w" else matrix  # of a weight, its rows are what is scaled
                self.sums[row, _SNR:] += _snr(channels, self.formats[role], top=top)

    # -- updates
    # ----------------------------------------------------------------------------------------------------

    def _weights(self) -> None:
        """The matrices of each module; the vectors of one without any."""
        matrices = {each.name.rpartition(".")[0] for each in self.shards if each.dims > 1}
        for each in self.shards:
            module = each.name.rpartition(".")[0]
            if each.first and (each.dims > 1 or module not in matrices):
                self._add(module, "w", [each.weight], snr=each.weight.dim() > 1)

    @torch.no_grad()
    def _gradients(self, gradients: Mapping[str, Tensor], divide: Tensor | float) -> None:
        trained = [
            each for each in self.shards if each.first and each.name in gradients and each.weight.numel()
        ]
        self._before += [(each, each.weight.clone()) for each in trained]
        for each, norm in zip(trained, _norms([gradients[each.name] for each in trained]), strict=True):
            self._figure(each, "gradient", (norm / divide).square())

    @torch.no_grad()
    def _updates(self) -> None:
        shards, before = [each for each, _ in self._before], [weight for _, weight in self._before]
        self._before = []
        for each, weight, norm in zip(shards, before, _norms(before), strict=True):
            self._figure(each, "weight", norm.square())
            if weight.dtype == torch.bfloat16:
                self._rounding(each, weight)
        if shards:
            torch._foreach_sub_(before, [each.weight for each in shards])
        for each, norm in zip(shards, _norms(before), strict=True):
            self._figure(each, "update", norm.square())

    def _rounding(self, each: WeightShard, before: Tensor) -> None:
        """What bf16 weights have kept of their update."""
        wanted = self.engine.wanted_update(each.name, before)
        if wanted is not None:
            change = each.weight.float() - before.float()
            self._figure(each, "wanted", wanted.square().sum())
            self._figure(each, "product", (wanted * change).sum())
            self._figure(each, "unchanged", ((change == 0) & (wanted != 0)).sum())
            self._figure(each, "count", change.numel())

    def _figure(self, each: WeightShard, what: str, value: Tensor | float) -> None:
        self.figures[self.parameters[each.name], _FIGURES.index(what)] += value

    # -- over all ranks
    # -----------------------------------------------------------------------------------------------

    def sample(self, result: StepResult) -> Sample:
        """The figures of the last sampled step, whose result this is (collective). Waits for the device."""
        largest = torch.nan_to_num(self.amax, nan=math.inf, posinf=math.inf)
        totals = torch.cat([self.sums.flatten(), self.figures.flatten()])
        self.mesh.sum(totals, over="world")
        if (group := self.mesh.group("world")) is not None:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        self.tops = torch.where(largest.isfinite(), largest, 0.0)
        held = result.skipped + result.empty + (0 if result.spike is None else result.spike)
        skipped, scale = bool(held), float(result.loss_scale)
        sums, figures = totals.split([self.sums.numel(), self.figures.numel()])
        rows, tops = sums.view_as(self.sums).tolist(), largest.tolist()
        modules: dict[str, dict[str, Statistics]] = {name: {} for name in self.names}
        for (name, role), row in self.rows.items():
            each = _statistics(role, rows[row], tops[row] / (scale if role == "g" else 1.0), scale=scale)
            if each is not None:
                modules[name][role] = each
        updates = figures.view_as(self.figures).tolist()
        return Sample(
            self.step,
            scale,
            skipped,
            self.formats,
            {name: roles for name, roles in modules.items() if roles},
            {name: _update(updates[row], skipped=skipped) for name, row in self.parameters.items()},
        )


def _modules(stage: Stage, engine: Monitored) -> dict[str, Counted]:
    """The modules with parameters; those that several stages have, of the first."""
    mesh, structure = engine.mesh, stage.structure
    size = mesh.layout.tp
    repeated = () if stage.first else structure.shared
    return {
        path: each
        for path, each in counted(stage, engine.slicing, rank=mesh.coordinates["tp"], size=size).items()
        if not any(f"{path}.".startswith(f"{other}.") for other in repeated)
    }


def _of_all_stages(modules: list[tuple[int, str]], *, patterns: Sequence[str]) -> list[str]:
    """The modules of the whole model that the patterns match, in their order; the same on every rank
    (collective). Raises UserError. `modules`: (stage, path) of this rank.
    """
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, modules)
    ordered = sorted((each for some in found for each in some), key=lambda each: each[0])
    names = list(dict.fromkeys(path for _, path in ordered))
    for pattern in patterns:
        check_one("precision.monitor_modules", pattern, names, what="module")
    return [name for name in names if matches(name, patterns)]


def _rows(parameters: list[str], *, modules: Sequence[str]) -> dict[str, int]:
    """Parameter -> its row, of the whole model in the order of its modules (collective)."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, parameters)
    place = {name: index for index, name in enumerate(modules)}
    ordered = sorted(
        dict.fromkeys(name for some in found for name in some),
        key=lambda name: place[name.rpartition(".")[0]],
    )
    return {name: row for row, name in enumerate(ordered)}


def _statistics(role: str, row: Sequence[float], amax: float, *, scale: float) -> Statistics | None:
    histogram, squares, snr = row[:BINS], row[_SQUARES], median_snr(row[_SNR:])
    count = sum(histogram)
    if role == "y":
        return Statistics((), amax, None, None) if amax else None
    if not count:
        return None
    rms = math.sqrt(squares / count) / (scale if role == "g" else 1.0)
    known = rms if math.isfinite(rms) else None
    return Statistics(tuple(int(number) for number in histogram), amax, known, snr)


def _update(row: Sequence[float], *, skipped: bool) -> Update:
    figure = dict(zip(_FIGURES, row, strict=True))
    norm = math.sqrt(figure["gradient"])
    if skipped:
        return Update(norm if math.isfinite(norm) else None, None, None, None)
    ratio = math.sqrt(figure["update"] / figure["weight"]) if figure["weight"] else None
    if not figure["wanted"]:
        return Update(norm, ratio, None, None)
    return Update(norm, ratio, figure["product"] / figure["wanted"], figure["unchanged"] / figure["count"])


# -- of one tensor -------------------------------------------------------------------------------------------


def _norms(tensors: list[Tensor]) -> Sequence[Tensor]:
    if not tensors:
        return []
    dtype = torch.promote_types(torch.float32, tensors[0].dtype)
    return torch._foreach_norm(tensors, dtype=dtype)


def _histogram(part: Tensor) -> Tensor:
    """Counts of the exponents that numbers have as float32, int, (256,)."""
    if part.dtype == torch.bfloat16:
        exponents = (part.contiguous().view(torch.int16) >> 7) & 255
    else:
        exponents = (part.contiguous().float().view(torch.int32) >> 23) & 255
    if part.device.type == "cpu":
        return torch.bincount(exponents.flatten(), minlength=BINS)
    return torch.histc(exponents.flatten().int(), bins=BINS, min=0, max=BINS)  # bincount waits for a GPU


def _amax(tensor: Tensor) -> Tensor:
    """The largest magnitude, fp32, 0-d; NaN if a number is."""
    low, high = torch.aminmax(tensor)  # on a CPU 18 times as fast as the norm of that name
    return torch.maximum(-low, high).float()


def _snr(rows: Tensor, name: str, *, top: Tensor) -> Tensor:
    """Counts of the signal-to-noise ratios of columns in bins of 1 dB, (SNR_BINS,), when numbers are rounded
    to a format, in one of up to 8 bits with the power of two as a scale that brings `top` to its highest
    exponent. Columns of zeros do not count.
    """
    form = NUMBERS[name]
    scale = torch.ones_like(top)
    if form.bits <= 8:
        highest = math.frexp(form.largest)[1]
        exponent = torch.frexp(torch.where(top.isfinite() & (top > 0), top, 1.0))[1]
        scale = torch.ldexp(scale, highest - exponent)
    rounded = round_to((rows * scale).clamp(-form.largest, form.largest), form).float() / scale
    signal, noise = rows.square().sum(0), (rows - rounded).square().sum(0)
    decibels = torch.nan_to_num(10 * torch.log10(signal / noise), nan=0.0).clamp(0, SNR_BINS - 1)
    bins = torch.where(signal > 0, decibels, SNR_BINS).int()
    return torch.zeros(SNR_BINS + 1, dtype=torch.float64, device=rows.device).scatter_add_(
        0, bins.long(), torch.ones_like(signal, dtype=torch.float64)
    )[:SNR_BINS]
