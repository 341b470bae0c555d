"""Initial weights by the model's own rules, independent of the layout.

The model is built without memory for its parameters, and its `_init_weights` is called while `Recorder` notes
what is done to each parameter: `normal_(0, 0.02)`, `ones_`, a row set to zero. The notes are then replayed on
the slices that a rank holds. Random numbers come from generators with the key (seed, name, block of rows), so
that each element has the same value under every layout, engine and world size, and a rank draws little more
than its own part.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import TorchDispatchMode

from hybridtrain.errors import refusal
from hybridtrain.models.build import saved_buffers
from hybridtrain.models.stage import Stage

Slices = tuple[slice, ...]
WeightSource = Callable[[str, tuple[int, ...], Slices], Tensor]
"""(name of a parameter or saved buffer, whole shape, slices) -> the values in these slices."""

_BLOCK = 1 << 20
"""Elements that are drawn from one generator, about: whole rows."""
_RANDOM = ("normal_", "uniform_")
_OVERWRITE = (*_RANDOM, "fill_", "zero_")
_ELEMENTWISE = {
    "fill_",
    "zero_",
    "mul_",
    "add_",
    "sub_",
    "div_",
    "clamp_",
    "erfinv_",
    "exp_",
    "log_",
    "neg_",
    "pow_",
}
_MOST_WHOLE = 10**9
"""Parameters of the largest model that is initialized whole, where a rule cannot be replayed on slices."""


@dataclass(frozen=True)
class Step:
    """One operation on a parameter, or on some of its rows."""

    operation: str
    arguments: tuple[float, ...]
    options: tuple[tuple[str, float], ...]
    first: int
    """First element in the parameter's memory."""
    elements: int


class Recorder(TorchDispatchMode):
    """Notes the operations that change tensors on meta in place."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[int, list[Step | None]] = {}
        """Memory of a tensor -> operations on it; None: one that cannot be replayed on a slice."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        changes = name.endswith("_") and not name.endswith("__")
        if changes and isinstance(args[0], Tensor) and args[0].device.type == "meta":
            self.steps.setdefault(_memory(args[0]), []).append(_step(name, args, kwargs or {}))
        return result

    def of(self, parameter: Tensor) -> list[Step] | None:
        """The operations that make up a parameter's values; None if they cannot be replayed on a slice."""
        steps: list[Step] = []
        overwritten = False
        for step in self.steps.get(_memory(parameter), []):
            if step is None:
                return None
            if step.elements == parameter.numel() and step.operation in _OVERWRITE:
                steps, overwritten = [], True
            steps.append(step)
        row = math.prod(parameter.shape[1:])
        aligned = not row or all(step.first % row == step.elements % row == 0 for step in steps)
        return steps if overwritten and aligned else None


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _step(name: str, args: Any, options: Mapping[str, Any]) -> Step | None:
    tensor, arguments = args[0], args[1:]
    given = {key: value for key, value in options.items() if value is not None and key != "generator"}
    numbers = all(isinstance(value, int | float) for value in (*arguments, *given.values()))
    if name not in {*_RANDOM, *_ELEMENTWISE} or not numbers or not tensor.is_contiguous():
        return None
    return Step(name, tuple(arguments), tuple(given.items()), tensor.storage_offset(), tensor.numel())


def draw(config: Any, *, seed: int) -> WeightSource:
    """Random initial weights as the model's own rules make them. `config`: a transformers config."""
    from hybridtrain.models.build import empty_model

    @functools.cache
    def recorded() -> tuple[Mapping[str, list[Step] | None], int, Mapping[str, Tensor]]:
        recorder = Recorder()
        model = empty_model(config, initializing=recorder)
        parameters = dict(model.named_parameters())
        count = sum(p.numel() for p in parameters.values())
        return {name: recorder.of(p) for name, p in parameters.items()}, count, saved_buffers(model)

    @functools.cache
    def real() -> Mapping[str, Tensor]:
        return _whole(config, seed=seed, parameters=recorded()[1])

    def values(name: str, shape: tuple[int, ...], slices: Slices) -> Tensor:
        if name in recorded()[2]:
            return recorded()[2][name][slices]
        steps = recorded()[0][name]
        return real()[name][slices] if steps is None else replay(steps, shape, slices, key=f"{seed}:{name}")

    return values


def replay(steps: list[Step], shape: tuple[int, ...], slices: Slices, *, key: str) -> Tensor:
    """The values that `steps` give to the slices of a parameter; random ones are those of `key`."""
    if not shape:
        return _rows(steps, (1,), 0, 1, key=key)[0]
    row = math.prod(shape[1:])
    size = max(1, _BLOCK // max(1, row))
    wanted = range(shape[0])[slices[0]]
    parts = []
    for block in range(wanted.start // size, -(-wanted.stop // size)) if wanted else ():
        start, stop = block * size, min(shape[0], (block + 1) * size)
        drawn = _rows(steps, shape, start, stop, key=f"{key}:{block}")
        parts.append(drawn[(slice(max(0, wanted.start - start), wanted.stop - start), *slices[1:])].clone())
    return torch.cat(parts) if parts else torch.empty(0, *shape[1:])[(slice(None), *slices[1:])]


def _rows(steps: list[Step], shape: tuple[int, ...], start: int, stop: int, *, key: str) -> Tensor:
    """Rows `start` to `stop` - 1 of a parameter."""
    rows, row = torch.empty(stop - start, *shape[1:]), math.prod(shape[1:])
    for number, step in enumerate(steps):
        first, last = (step.first // row, (step.first + step.elements) // row) if row else (0, 0)
        part = rows[max(0, first - start) : max(0, last - start)]
        options: dict[str, Any] = dict(step.options)
        if step.operation in _RANDOM:
            digest = hashlib.sha256(f"{key}:{number}".encode()).digest()
            options["generator"] = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        getattr(part, step.operation)(*step.arguments, **options)
    return rows


def _whole(config: Any, *, seed: int, parameters: int) -> Mapping[str, Tensor]:
    """All weights, from the model built in memory."""
    from hybridtrain.models.build import plain_model

    if parameters > _MOST_WHOLE:
        problem = f"its initial weights cannot be drawn in parts, and {parameters:,} parameters are too many"
        raise refusal(
            "model.config.model_type",
            config.model_type,
            problem,
            allowed=f"up to {_MOST_WHOLE:,} parameters",
            instead="model.from_pretrained=FOLDER",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {name: parameter.detach() for name, parameter in plain_model(config).named_parameters()}


@torch.no_grad()
def fill(stages: Iterable[Stage], source: WeightSource) -> None:
    """Set this rank's part of every parameter, and the buffers that are saved with the model.

    A tied head has the embedding's values, also on another stage.
    """
    for stage in stages:
        for name, parameter in stage.named_parameters():
            slices = local_slices(parameter)
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if math.prod(local.shape):
                local.copy_(source(stage.owner(name), tuple(parameter.shape), slices))
        fill_buffers(saved_buffers(stage), source)


@torch.no_grad()
def fill_buffers(buffers: Mapping[str, Tensor], source: WeightSource) -> None:
    """Set saved buffers: every rank of a stage has them whole."""
    for name, buffer in buffers.items():
        buffer.copy_(source(name, tuple(buffer.shape), local_slices(buffer)))


def local_slices(parameter: Tensor) -> Slices:
    """The slices of the whole parameter that this rank holds."""
    if not isinstance(parameter, DTensor):
        return tuple(slice(0, size) for size in parameter.shape)
    sizes, offsets = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))


def reset_buffers(stage: Stage, *, device: torch.device) -> None:
    """Set buffers such as rotary frequencies to the values that the model was built with.

    `to_empty` leaves them uninitialized. Few are in checkpoints (build.saved_buffers).
    """
    for name, value in stage.initial_buffers.items():
        path, _, key = name.rpartition(".")
        module = stage.get_submodule(path)
        saved = key not in module._non_persistent_buffers_set
        setattr(module, key, nn.Buffer(value.to(device, copy=True), persistent=saved))
