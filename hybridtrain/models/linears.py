"""The linear layers inside a model's layers: those that may multiply in a format of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from hybridtrain.models import build
from hybridtrain.models.reduced import EXPERT_COUNTS
from hybridtrain.models.structure import structure_of


@dataclass(frozen=True)
class Linear:
    """A linear layer of the whole model."""

    path: str
    layer: int
    """Number of the layer that it is in."""
    layers: int
    """Number of layers of the model."""
    inputs: int
    outputs: int
    router: bool
    """Whether it chooses experts: its outputs are compared, not added up."""


def is_linear(module: nn.Module) -> bool:
    """Whether it multiplies its input by its weight, and does nothing else: torch's Linear, Conv1D of
    transformers, whose weight is transposed, and what these are converted to (precision/qlinear.py).
    """
    return is_transposed(module) or type(module).forward is nn.Linear.forward or hasattr(module, "product")


def is_transposed(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, whose weight is (inputs, outputs)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D) or getattr(module, "transposed", False)


def linears_in(
    layer: nn.Module, *, path: str, number: int, config: Any
) -> Iterator[tuple[Linear, nn.Module]]:
    """The linear layers of one layer, and their modules. Sizes are those of the whole, as long as it is not
    cut.
    """
    text = config.get_text_config(decoder=True)
    experts = {getattr(text, name, None) for name in EXPERT_COUNTS} - {None, 0, 1}
    for name, module in layer.named_modules():
        if is_linear(module):
            weight: Any = module.weight
            outputs, inputs = weight.shape[::-1] if is_transposed(module) else weight.shape
            where = f"{path}.{name}" if name else path
            router = outputs in experts and not name.endswith("_proj")  # as wide by chance
            yield Linear(where, number, text.num_hidden_layers, inputs, outputs, router), module


def linears_of(config: Any) -> list[Linear]:
    """Those of the whole model, from its config alone."""
    structure = structure_of(config)
    model = build.meta_model(config)
    layers: Any = model.get_submodule(structure.layers)
    return [
        linear
        for number, layer in enumerate(layers)
        for linear, _ in linears_in(layer, path=f"{structure.layers}.{number}", number=number, config=config)
    ]
