"""Watches what the modules of this rank's stages compute during a step: inputs, outputs, and the gradients of
both, as local tensors.

    with watching(stages, numbers, watcher):     numbers of the stages in the whole model
        engine.train_step(...)

Modules are those that compute something themselves: without children, or with parameters of their own; the
head, whose output is the loss; and each call of the attention function, as `<path of its module>.attention`.
Forward passes that recomputation repeats are not watched. Compiled layers run uncompiled meanwhile; without a
watcher nothing is hooked, and compiled code is as before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hybridtrain.models import attention
from hybridtrain.models.stage import Stage
from hybridtrain.models.structure import is_stub
from hybridtrain.parallel.grad_norm import local_part
from hybridtrain.parallel.recompute import uncompiled
from hybridtrain.tasks.head import Head


@dataclass(frozen=True)
class Call:
    """One call of a module in a forward pass."""

    stage: int
    """Number of the stage in the whole model."""
    micro_batch: int
    order: int
    """Place in the stage's forward pass of this micro-batch: in how many calls before this one ended."""
    name: str
    """Path of the module, the same under every layout."""
    module: nn.Module


class Watcher(Protocol):
    """Tensors are local: the part that this rank computes. No collectives in these methods: ranks call them
    in different orders.
    """

    inputs: bool
    """Whether to watch also gradients of inputs and parameters, and the losses of rows. Each call then gets
    views of its own: modules that share an input, and micro-batches that share a parameter, would see the
    sum of their gradients."""

    def forward(self, call: Call, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """After a call, without autograd. The floating-point tensors among arguments and results."""

    def output_gradient(self, call: Call, gradient: Tensor) -> None:
        """In the backward pass, for each output that has a gradient; before the module's own backward."""

    def input_gradient(self, call: Call, gradient: Tensor) -> None:
        """The same for its inputs; after the module's own backward."""

    def parameter_gradient(self, call: Call, gradient: Tensor) -> None:
        """The same for its own parameters: the gradient of one micro-batch."""

    def row_losses(self, call: Call, sums: Tensor) -> None:
        """After a call of the head: the task's sums for each row alone, (B, number of sums)."""


@contextlib.contextmanager
def watching(stages: Sequence[Stage], numbers: Sequence[int], watcher: Watcher) -> Iterator[None]:
    """Call `watcher` for every module of the stages."""
    with contextlib.ExitStack() as stack:
        positions = [_Position(number, stage) for number, stage in zip(numbers, stages, strict=True)]
        for stage, position in zip(stages, positions, strict=True):
            stack.enter_context(uncompiled(stage))
            stack.enter_context(_replaced(stage, position.begin))
            for name, module in watched(stage):
                stack.enter_context(_replaced(module, _Watched(name, module, position, watcher)))
        owners = {id(module): (path, p) for p in positions for path, module in p.stage.named_modules()}

        def observe(function: Callable[..., Any]) -> Callable[..., Any]:
            """The attention function of transformers: (module, query, key, value, mask, ...)."""

            def call(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *given: Any, **options: Any) -> Any:
                path, position = owners[id(module)]
                watched_call = _Watched(f"{path}.attention", module, position, watcher)
                return watched_call(lambda q, k, v: function(module, q, k, v, *given, **options))(q, k, v)

            return call

        stack.enter_context(attention.observed(stages[0].config, observe))
        yield


def watched(stage: Stage) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the modules of a stage that compute something themselves."""
    for name, module in stage.named_modules():
        alone = next(module.children(), None) is None
        if (
            name
            and not is_stub(module)
            and (alone or next(module.parameters(recurse=False), None) is not None)
        ):
            yield name, module


class _Position:
    """Where a stage is in its forward passes."""

    def __init__(self, number: int, stage: Stage):
        self.number, self.stage, self.micro_batch, self.order = number, stage, -1, 0

    def begin(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            self.micro_batch, self.order = self.micro_batch + 1, 0
            return forward(*given, **options)

        return call

    def next(self, name: str, module: nn.Module) -> Call:
        self.order += 1
        return Call(self.number, self.micro_batch, self.order - 1, name, module)


class _Watched:
    """Wraps the forward of one module."""

    def __init__(self, name: str, module: nn.Module, position: _Position, watcher: Watcher):
        self.name, self.module, self.position, self.watcher = name, module, position, watcher

    def __call__(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            parameters: list[Tensor] = []
            with contextlib.ExitStack() as stack:
                if self.watcher.inputs:
                    given, options = _views(given), dict(zip(options, _views(options.values()), strict=True))
                    parameters = stack.enter_context(_own_parameters(self.module))
                result = forward(*given, **options)
            if torch._C._current_graph_task_id() != -1:  # inside a backward pass: a recomputation
                return result
            place = self.position.next(self.name, self.module)  # after those of the modules inside
            self._watch(place, _floats((*given, *options.values())), _floats(_flat(result)), parameters)
            if self.watcher.inputs and isinstance(self.module, Head):
                self._watch_rows(place, forward, *given)
            return result

        return call

    def _watch(
        self, call: Call, inputs: list[Tensor], outputs: list[Tensor], parameters: list[Tensor]
    ) -> None:
        watcher = self.watcher
        with torch.no_grad(), torch._C.DisableTorchFunction():  # without the mode of precision=fp64
            watcher.forward(call, [x.detach() for x in inputs], [y.detach() for y in outputs])
        for y in outputs:
            _once(y, lambda gradient: watcher.output_gradient(call, gradient))
        for x in inputs if watcher.inputs else ():
            _once(x, lambda gradient: watcher.input_gradient(call, gradient))
        for p in parameters:
            _once(p, lambda gradient: watcher.parameter_gradient(call, local_part(gradient)))

    @torch.no_grad()
    def _watch_rows(self, call: Call, forward: Callable[..., Any], hidden: Tensor, batch: Any) -> None:
        """Repeat the loss for each row alone. Tensor-parallel ranks do so together."""
        with contextlib.suppress(Exception):  # a user's loss may need several rows
            rows = [forward(hidden[row : row + 1], batch.rows(row, row + 1)) for row in range(len(hidden))]
            self.watcher.row_losses(call, torch.stack(rows))


def _once(tensor: Tensor, show: Callable[[Tensor], None]) -> None:
    """Call `show` with the tensor's gradient; once, where a split backward pass goes through it twice."""
    if not tensor.requires_grad:
        return
    left = [show]

    def hook(gradient: Tensor) -> None:
        if left:
            left.pop()(gradient.detach())

    tensor.register_hook(hook)


def _flat(result: Any) -> tuple[Any, ...]:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def _floats(values: Sequence[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def _views(values: Any) -> tuple[Any, ...]:
    return tuple(
        value.view_as(value) if isinstance(value, Tensor) and value.requires_grad else value
        for value in values
    )


@contextlib.contextmanager
def _own_parameters(module: nn.Module) -> Iterator[list[Tensor]]:
    """Views in place of the parameters of a module that are trained, meanwhile."""
    table: dict[str, Any] = module._parameters
    kept = {name: p for name, p in table.items() if p is not None and p.requires_grad}
    views: dict[str, Any] = {name: p.view_as(p) for name, p in kept.items()}
    table.update(views)
    try:
        yield list(views.values())
    finally:
        table.update(kept)


@contextlib.contextmanager
def _replaced(module: Any, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """A module with another forward, meanwhile."""
    own = module.__dict__.get("forward")
    module.forward = wrap(module.forward)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
