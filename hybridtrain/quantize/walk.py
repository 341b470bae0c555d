"""Quantises a model layer by layer: only one layer's weights are in memory, and what goes in and comes out of
it on the calibration rows.

    rows -> layer 0 -> hidden states -> layer 1 -> ...      each a stage of one layer (models/stage.py), run
                                                            twice: to see its inputs, and with its new weights

So what a layer is calibrated on already has the errors of the layers before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybridtrain.errors import refusal
from hybridtrain.models.init import WeightSource, fill, reset_buffers
from hybridtrain.models.linears import Linear, is_transposed
from hybridtrain.models.stage import Stage
from hybridtrain.models.tracing import hooked
from hybridtrain.quantize import experts, gptq, inputs
from hybridtrain.quantize.experts import Matrix, Part, linears_in
from hybridtrain.quantize.grids import Grid, grid_of
from hybridtrain.quantize.inputs import Seen
from hybridtrain.quantize.schemes import Scheme, check_shape
from hybridtrain.runtime import log
from hybridtrain.types import Batch

_log = log.get("quantize")


@dataclass(frozen=True)
class Quantised:
    """A linear layer, quantised. Weights are (outputs, inputs), of Conv1D too."""

    linear: Linear
    scheme: Scheme
    grid: Grid | None
    """None for numbers without scales, whose codes are the numbers."""
    codes: Tensor
    factors: tuple[Tensor, Tensor] | None
    """(outputs, rank), (rank, inputs): a product that is added."""
    bias_change: Tensor | None
    input_scale: Tensor | None
    """0-d, of inputs with one scale."""
    error: float | None
    """Mean square error of its outputs on the calibration rows, divided by their mean square."""

    def weight(self) -> Tensor:
        """What it multiplies by, fp32."""
        value = self.codes.float() if self.grid is None else self.grid.values(self.codes, start=0)
        return value if self.factors is None else value + self.factors[0].float() @ self.factors[1].float()


Choose = Callable[[Linear], Scheme | None]
"""The scheme of a linear layer; None: left as it is."""


def check_any(linears: Sequence[Linear], source: str, *, field: str) -> None:
    """Refuse a model without linear layers that are known (raises UserError)."""
    if not linears:
        raise refusal(
            field,
            source,
            "it has no linear layers of torch or transformers inside its layers",
            allowed="models with such layers",
            instead="a model of another architecture",
        )


def check(linears: Sequence[Linear], choose: Choose, *, tokens: int, field: str, rows_field: str) -> None:
    """Refuse schemes that do not fit a layer, or have too few rows (raises UserError)."""
    for linear in linears:
        if (scheme := choose(linear)) is not None:
            sizes = {"outputs": linear.outputs, "inputs": linear.inputs, "path": linear.path}
            check_shape(scheme, **sizes, field=field)  # type: ignore[arg-type]
            where = {"inputs": linear.inputs, "path": linear.path}
            if isinstance(linear, Part):  # few tokens: rounded, see _fewer
                experts.check(linear, scheme, field=field)
                continue
            gptq.check_tokens(tokens, **where, scheme=scheme, field=rows_field)  # type: ignore[arg-type]


def layers(
    config: Any,
    source: WeightSource,
    choose: Choose,
    *,
    rows: Sequence[Batch],
    device: torch.device,
    field: str,
) -> Iterator[list[Quantised]]:
    """The quantised linear layers of each layer in turn. Without rows, schemes need none of their inputs."""
    states = inputs_of_first(rows)
    return layers_from(0, config, source, choose, states=states, rows=rows, device=device, field=field)


def inputs_of_first(rows: Sequence[Batch]) -> list[Tensor]:
    """What goes into the first layer's stage, a tensor for each batch."""
    return [row.input_ids_BT for row in rows]


def layers_from(
    first: int,
    config: Any,
    source: WeightSource,
    choose: Choose,
    *,
    states: list[Tensor],
    rows: Sequence[Batch],
    device: torch.device,
    field: str,
) -> Iterator[list[Quantised]]:
    """`layers` from number `first` on.

    `states`: what goes into it, a tensor for each batch of rows, in place of which comes what goes into the
    next layer, before a layer's results are returned. Nothing of a layer is kept here.
    """
    for number in range(first, config.get_text_config(decoder=True).num_hidden_layers):
        yield _layer(number, config, source, choose, states=states, rows=rows, device=device, field=field)


def _layer(
    number: int,
    config: Any,
    source: WeightSource,
    choose: Choose,
    *,
    states: list[Tensor],
    rows: Sequence[Batch],
    device: torch.device,
    field: str,
) -> list[Quantised]:
    count = config.get_text_config(decoder=True).num_hidden_layers
    stage = _stage(config, number, count=count, source=source, device=device, runs=bool(rows))
    found = list(_chosen(stage, number, choose))
    seen = _seen(stage, found, rows=rows, states=states, device=device)
    _fewer(found, seen)
    results = [
        _quantised(linear, module, scheme, seen.pop(linear.path, None), field=field)
        for linear, module, scheme in found
    ]
    if number + 1 < count:
        for result, (_, module, _) in zip(results, found, strict=True) if rows else ():
            put(module, result)
        for place, row in enumerate(rows):
            states[place] = _run(stage, states[place], row, device=device)
    stage.to_empty(device="meta")  # its modules refer to one another, and would keep the weights for a while
    return results


def _stage(
    config: Any, number: int, *, count: int, source: WeightSource, device: torch.device, runs: bool
) -> Stage:
    """A layer with its weights, and before the first the embedding if it `runs`."""
    stage = Stage(
        config,
        layers=range(number, number + 1),
        first=runs and number == 0,
        last=number + 1 == count,
        head=lambda own, **_: _NoHead(),  # noqa: ARG005
    )
    stage.to_empty(device=device)
    reset_buffers(stage, device=device)
    fill([stage], source)
    return stage.eval().requires_grad_(False)


class _NoHead(nn.Module):
    """In the place of the head: the last hidden states are what the last stage returns."""

    def forward(self, hidden: Tensor, *_: Any) -> Tensor:
        return hidden


def _chosen(stage: Stage, number: int, choose: Choose) -> Iterator[tuple[Linear, Any, Scheme]]:
    path = f"{stage.structure.layers}.{number}"
    for linear, module in linears_in(stage.part(path), path=path, number=number, config=stage.config):
        if (scheme := choose(linear)) is not None:
            yield linear, module, scheme


@torch.no_grad()
def _run(stage: Stage, state: Tensor, row: Batch, *, device: torch.device) -> Tensor:
    """What the layer makes of a batch, in main memory."""
    return stage(state.to(device), batch=row.to(device)).cpu()


def _seen(
    stage: Stage,
    found: Sequence[tuple[Linear, Any, Scheme]],
    *,
    rows: Sequence[Batch],
    states: Sequence[Tensor],
    device: torch.device,
) -> dict[str, Seen]:
    """Path -> what went into a linear layer on the calibration rows."""
    if not rows:
        return {}
    seen = {linear.path: Seen(scheme) for linear, _, scheme in found}
    handles = [
        module.register_forward_pre_hook(lambda _, given, each=seen[linear.path]: each.add(given[0]))
        for linear, module, _ in found
    ]
    with hooked(*handles):
        for state, row in zip(states, rows, strict=True):
            _run(stage, state, row, device=device)
    return seen


def _fewer(found: Sequence[tuple[Linear, Any, Scheme]], seen: dict[str, Seen]) -> None:
    """Say how many matrices of experts are rounded, as too few tokens were theirs for GPTQ."""
    parts = [linear for linear, _, scheme in found if isinstance(linear, Part) and scheme.gptq]
    if few := sum(not seen[part.path].determines(part.inputs) for part in parts):
        _log.warning(
            "%s: %d of %d matrices saw fewer calibration tokens than they have inputs, and are rounded "
            "without GPTQ; more rows (quantize.rows, compare.calibration_rows) reach more",
            parts[0].module,
            few,
            len(parts),
        )


def _quantised(linear: Linear, module: Any, scheme: Scheme, seen: Seen | None, *, field: str) -> Quantised:
    weight = module.weight.float()
    weight = weight.t() if is_transposed(module) else weight
    grid: Grid | None
    if scheme.share == "":
        grid, codes = None, weight.to({"bf16": torch.bfloat16, "fp16": torch.float16}[scheme.codes])
    elif scheme.gptq and (not isinstance(linear, Part) or (seen and seen.determines(linear.inputs))):
        assert seen is not None
        grid, codes = gptq.quantise(weight, seen.hessian, scheme, path=linear.path, field=field)
    else:
        grid = grid_of(weight, scheme)
        codes = grid.nearest(weight, start=0)
    rest = weight - (codes.float() if grid is None else grid.values(codes, start=0))
    factors = None
    if scheme.rank:
        factors = _low_rank(rest, scheme.rank)
        rest = rest - factors[0].float() @ factors[1].float()
    bias = error = scale = None
    if seen is not None and seen.tokens:
        bias = seen.mean @ rest.t() if scheme.bias else None
        error = seen.error(rest, weight, bias=bias)
        scale = seen.scale()
    return Quantised(linear, scheme, grid, codes, factors, bias, scale, error)


def _low_rank(rest: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The product of this rank that is nearest to a matrix, its factors in bf16."""
    left, sizes, right = torch.linalg.svd(rest, full_matrices=False)
    root = sizes[:rank].sqrt()
    return (left[:, :rank] * root).bfloat16(), (root[:, None] * right[:rank]).bfloat16()


def put(module: Any, result: Quantised) -> Callable[[], None]:
    """Let a linear layer of a plain model compute as it is quantised, in its own dtype, in place. Returns
    what undoes it.
    """
    if isinstance(module, Matrix):
        return module.put(result.weight())
    weight, bias = module.weight.data, module.bias
    before = None if bias is None else bias.data
    value = result.weight()
    module.weight.data = (value.t() if is_transposed(module) else value).to(weight)
    change = result.bias_change
    if change is not None:
        new = change.to(weight) if before is None else before + change.to(before)
        module.bias = nn.Parameter(new, requires_grad=False)
    hook = None
    if result.scheme.inputs:
        hook = module.register_forward_pre_hook(inputs.rounding(result.scheme, result.input_scale))

    def undo() -> None:
        module.weight.data, module.bias = weight, bias
        if hook is not None:
            hook.remove()

    return undo


def place(model: Any, result: Quantised) -> Callable[[], None]:
    """`put` in the place of a linear layer in a plain model."""
    return put(experts.module_of(model, result.linear), result)


@contextmanager
def changed(model: Any, layers: Iterable[Quantised]) -> Iterator[None]:
    """A plain model with these layers quantised, inside the `with` block."""
    undo = [place(model, each) for each in layers]
    try:
        yield
    finally:
        for each in undo:
            each()
