"""Makes the linear layers of a stage multiply in the formats of precision.compute and precision.rules.

After tensor parallelism has cut them: a scale is that of the whole operand, and the way a weight is cut says
which operands ranks have parts of.

    weight (N, K) cut along   input     output's gradient   example
    N                         whole     cut                 q_proj, up_proj
    K                         cut       whole               o_proj, down_proj
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hybridtrain.config.schema import PrecisionConfig
from hybridtrain.errors import UserError, refusal
from hybridtrain.models.linears import Linear, is_transposed, linears_in, linears_of
from hybridtrain.models.slicing import Slicing, heads_of
from hybridtrain.models.stage import Stage
from hybridtrain.plan.formats import BLOCK, FORMATS, HIGH, SCHEMES
from hybridtrain.precision.adaptive import Controller
from hybridtrain.precision.device import KERNEL_MULTIPLE, check_sizes, is_native
from hybridtrain.precision.qlinear import Product, convert
from hybridtrain.precision.rules import adapts, format_of, high_if_same
from hybridtrain.runtime.collectives import Ranks


def linears(stage: Stage) -> list[tuple[Linear, Any]]:
    """The linear layers in the stage's layers, and their modules."""
    return [
        found
        for index, layer in stage.layer_modules()
        for found in linears_in(
            layer, path=f"{stage.structure.layers}.{index}", number=index, config=stage.config
        )
    ]


def formats(stage: Stage, precision: PrecisionConfig) -> dict[str, str]:
    """Path of a linear layer -> its format, or HIGH, as the config has it."""
    return {linear.path: format_of(linear, precision) for linear, _ in linears(stage)}


class Converter:
    """Converts linear layers, and changes their formats later."""

    def __init__(
        self, precision: PrecisionConfig, *, slicing: Slicing, ranks: Ranks | None, device: torch.device
    ):
        """`ranks`: of tensor parallelism, which has cut the layers by `slicing`."""
        self.precision, self.slicing, self.ranks, self.device = precision, slicing, ranks, device

    def apply(self, stage: Stage) -> None:
        """Convert the linear layers of a stage that are not high, in place. Raises UserError for one that a
        format does not fit, or, with adaptive precision, one that it may come to have.
        """
        chosen = formats(stage, self.precision)
        for linear, module in linears(stage):
            for name in self.precision.ladder if adapts(linear, self.precision) else ():
                if high_if_same(name, self.precision) != HIGH:
                    self._product(stage, linear, module, name)
        self.change(stage, {path: name for path, name in chosen.items() if name != HIGH})

    def change(self, stage: Stage, names: Mapping[str, str]) -> None:
        """Let linear layers, by path, multiply in other formats from now on. Those of other stages are left
        out.
        """
        for linear, module in linears(stage):
            if linear.path in names:
                name = high_if_same(names[linear.path], self.precision)
                convert(module, None if name == HIGH else self._product(stage, linear, module, name))

    def _product(self, stage: Stage, linear: Linear, module: nn.Module, name: str) -> Product:
        cut, ranks = "", self.ranks
        if ranks is not None:
            key = f"{linear.path}.weight".removeprefix(f"{stage.structure.layers}.{linear.layer}.")
            scaled = FORMATS[name].scale and name not in SCHEMES  # of those no gradient has a scale
            if scaled and _has_parts(key, self.slicing, stage, ranks=ranks):
                raise _refusal(linear, name)
            if (piece := stage.pieces.get(f"{linear.path}.weight")) is not None:
                cut = "NK"[1 - piece.dim if is_transposed(module) else piece.dim]
        size = 1 if ranks is None else ranks.size
        sizes = {
            "inputs": linear.inputs // size if cut == "K" else linear.inputs,
            "outputs": linear.outputs // size if cut == "N" else linear.outputs,
        }
        native = is_native(name, self.device) and not self.precision.emulate
        if native:
            check_sizes(linear.path, name, multiple=KERNEL_MULTIPLE, **sizes)
        if cut and FORMATS[name].scale == "block":  # else a block would be on two ranks
            if name in SCHEMES:  # blocks of the weight, which lie in its rows
                del sizes["outputs"]
            check_sizes(linear.path, name, multiple=BLOCK, **sizes)
        return Product(FORMATS[name], cut, ranks if cut else None, native=native)


def _has_parts(key: str, slicing: Slicing, stage: Stage, *, ranks: Ranks) -> bool:
    """Whether ranks that have the same weight compute parts of its gradient: a whole one inside a block, or
    key and value heads that ranks share.
    """
    if key in slicing.cuts:
        return "kv" in slicing.cuts[key] and heads_of(stage.config)[1] < ranks.size
    return key in slicing.partial


def converted(stage: Stage) -> set[str]:
    """Paths of the linear layers that multiply in a format."""
    return {path for path, module in stage.named_modules() if getattr(module, "product", None) is not None}


def _refusal(linear: Linear, name: str) -> UserError:
    return refusal(
        "precision.compute",
        name,
        f"each tensor-parallel rank computes a part of the output gradient of {linear.path}, and its scale "
        "is that of the sum",
        allowed="fp16 or bf16 for this layer, or fewer tensor-parallel ranks",
        instead=f"precision.rules=[{{match: '*.{linear.path.rpartition('.')[2]}', compute: high}}]",
    )


def adaptive_of(precision: PrecisionConfig, config: Any) -> Controller | None:
    """The controller of adaptive precision for a whole model, if the config asks for it."""
    if not precision.adaptive:
        return None
    sizes = {
        linear.path: linear.inputs * linear.outputs
        for linear in linears_of(config)
        if adapts(linear, precision)
    }
    return Controller(
        sizes, precision.ladder, patience=precision.adaptive_patience, budget=precision.adaptive_budget
    )
