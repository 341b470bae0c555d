"""Experts whose weights are parameters of three dimensions: each expert's matrices, as files hold them.

    experts.gate_up_proj (E, 2 I, H)   ->   experts.3.gate_proj (I, H), experts.3.up_proj (I, H)

E experts, H hidden size, I inner size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hybridtrain.errors import refusal
from hybridtrain.models import build, linears
from hybridtrain.models.conversion import as_stored
from hybridtrain.models.linears import Linear
from hybridtrain.models.structure import structure_of
from hybridtrain.quantize.schemes import Scheme

Hook = Callable[[Any, tuple[Tensor]], None]


@dataclass(frozen=True)
class Part(Linear):
    """A matrix of one expert. Its path is that of files."""

    module: str
    """Path of the experts of its layer."""
    parameter: str
    expert: int
    start: int
    """First of its rows in the expert's part of the parameter."""


class Matrix:
    """What a part is in a model, as if it were a linear layer."""

    bias = None

    def __init__(self, part: Part, watch: _Watch):
        self.part, self.watch = part, watch

    @property
    def weight(self) -> Tensor:
        """A view (N, K) of the parameter."""
        whole = self.watch.slice(self.part)
        return whole[self.part.start : self.part.start + self.part.outputs]

    def put(self, weight: Tensor) -> Callable[[], None]:
        """Replace the weight, in place; returns what undoes it."""
        before = self.weight.clone()
        self.weight.copy_(weight)

        def undo() -> None:
            self.weight.copy_(before)

        return undo

    def register_forward_pre_hook(self, hook: Hook) -> Any:
        """Call `hook` with what the matrix is multiplied by, as that of a module."""
        return self.watch.add(self, hook)


class _Watch(TorchFunctionMode):
    """Looks at the products with matrices of a layer's experts, while these compute one after the other."""

    def __init__(self, experts: Any):
        super().__init__()
        self.experts = experts
        self.hooks: list[tuple[Matrix, Hook]] = []
        self._at: dict[int, list[tuple[Matrix, Hook]]] = {}
        self._handles: list[Any] = []
        self._before: str | None = None

    def add(self, matrix: Matrix, hook: Hook) -> _Watch:
        """Call a hook for a matrix, too."""
        self.hooks.append((matrix, hook))
        if not self._handles:
            enter = self.experts.register_forward_pre_hook(self._enter)
            self._handles = [enter, self.experts.register_forward_hook(self._exit, always_call=True)]
        return self

    def slice(self, part: Part) -> Tensor:
        """What is an expert's in a parameter."""
        whole: Tensor = getattr(self.experts, part.parameter).data
        return whole[part.expert]

    def _enter(self, experts: Any, _: Any) -> None:
        self._at = {}
        for matrix, hook in self.hooks:
            self._at.setdefault(self.slice(matrix.part).data_ptr(), []).append((matrix, hook))
        self._before = experts.config._experts_implementation
        experts.config._experts_implementation = "eager"
        self.__enter__()

    def _exit(self, experts: Any, *_: Any) -> None:
        self.__exit__(None, None, None)
        experts.config._experts_implementation = self._before

    def remove(self) -> None:
        """Look at none."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.hooks = [], []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            for matrix, hook in self._at.get(args[1].data_ptr(), []):
                hook(matrix, (args[0],))
        return func(*args, **(kwargs or {}))


def linears_of(config: Any) -> list[Linear]:
    """The linear layers of a model, and the matrices of its experts."""
    meta, path = build.meta_model(config), structure_of(config).layers
    parts: list[Linear] = []
    layers: Any = meta.get_submodule(path)
    for number, layer in enumerate(layers):
        found = _matrices(layer, f"{path}.{number}", number=number, config=config, meta=meta)
        parts += [matrix.part for matrix in found]
    return sorted([*linears.linears_of(config), *parts], key=lambda linear: linear.layer)


def linears_in(
    layer: nn.Module, *, path: str, number: int, config: Any
) -> Iterator[tuple[Linear, nn.Module | Matrix]]:
    """Those of one layer, and what they are in it."""
    yield from linears.linears_in(layer, path=path, number=number, config=config)
    if any(_parameters(module) for module in layer.modules()):
        meta = build.meta_model(config)
        for matrix in _matrices(layer, path, number=number, config=config, meta=meta):
            yield matrix.part, matrix


def module_of(model: Any, linear: Linear) -> Any:
    """What a linear layer is in a model."""
    if isinstance(linear, Part):
        return Matrix(linear, _Watch(model.get_submodule(linear.module)))
    return model.get_submodule(linear.path)


def key(linear: Linear) -> str:
    """What a plan calls it: all experts of a layer have one scheme."""
    return linear.module if isinstance(linear, Part) else linear.path


def _parameters(module: nn.Module) -> Mapping[str, nn.Parameter]:
    """Those of three dimensions, of experts."""
    named = module.named_parameters(recurse=False)
    many = getattr(module, "num_experts", None)
    return {name: each for name, each in named if each.dim() == 3 and len(each) == many}


def names(meta: nn.Module) -> set[str]:
    """The parameters of all experts, of which files hold a matrix for each."""
    return {
        f"{path}.{name}"
        for path, module in meta.named_modules()
        for name, each in _parameters(module).items()
        if _stored(meta, f"{path}.{name}", each)
    }


def unknown(meta: nn.Module) -> str:
    """A parameter of experts that files do not hold as a matrix for each; empty: none."""
    known = names(meta)
    for path, module in meta.named_modules():
        for name, each in module.named_parameters(recurse=False):
            where = f"{path}.{name}"
            if each.dim() == 3 and "expert" in where and where not in known:
                return where
    return ""


def _stored(meta: nn.Module, name: str, parameter: Tensor) -> dict[str, Tensor]:
    """Name of a matrix in files -> numbers of its rows (N, 2); none where files do not have these."""
    many, rows, _ = parameter.shape
    numbers = torch.arange(many * rows).view(many, rows, 1).repeat(1, 1, 2)
    stored = as_stored(meta, {name: numbers})
    whole = all(each.dim() == 2 and path.endswith(".weight") for path, each in stored.items())
    found = {path: each for path, each in stored.items() if (each.diff(dim=0) == 1).all()}
    return found if whole and len(found) == len(stored) else {}


def _matrices(layer: nn.Module, path: str, *, number: int, config: Any, meta: nn.Module) -> Iterator[Matrix]:
    layers = config.get_text_config(decoder=True).num_hidden_layers
    for inner, module in layer.named_modules():
        where, watch = f"{path}.{inner}", _Watch(module)
        for name, parameter in _parameters(module).items():
            for stored, numbers in _stored(meta, f"{where}.{name}", parameter).items():
                expert, start = divmod(int(numbers[0, 0]), parameter.shape[1])
                sizes = (number, layers, parameter.shape[2], len(numbers), False)
                part = Part(stored.removesuffix(".weight"), *sizes, where, name, expert, start)
                yield Matrix(part, watch)


def check(part: Part, scheme: Scheme, *, field: str) -> None:
    """Refuse a scheme that changes more of an expert than its weights (raises UserError)."""
    if scheme.inputs or scheme.bias:
        raise refusal(
            field,
            scheme.name,
            f"{part.module} has no layers whose inputs are rounded, or that have a bias",
            allowed="schemes without -a8, -a8s and -bias for experts",
            instead=f"int8, or a plan (quantize.plan) with {part.module}: int8",
        )
