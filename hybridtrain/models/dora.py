"""DoRA: a linear layer with a low-rank adapter whose weight has a length of its own for each output
(arXiv 2402.09353).

    y = m * (W + scale B A) x / |W + scale B A|        m (N,) is trained; |.| is the length of each row

m, the layer's parameter `lora_magnitude_vector` as in peft, begins at |W|. The backward pass takes the
lengths for constants. They are computed without the sum of the matrices:

    |W + scale B A|^2 = |W|^2 + 2 scale (W A' * B) 1 + scale^2 (B A A' * B) 1

Where tensor parallelism cuts the inputs K of a layer, these are sums over ranks (`share`). With dropout, as
in peft, x is whole in the product with W itself, and has elements dropped in what is added to it:

    y = W x + (m / |.| - 1) W drop(x) + m / |.| scale B A drop(x)
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from hybridtrain.models import quantised
from hybridtrain.models.init import WeightSource
from hybridtrain.models.linears import is_transposed
from hybridtrain.runtime.collectives import Ranks

MAGNITUDE = "lora_magnitude_vector"


def add(module: Any, *, outputs: int) -> None:
    """Give a linear layer that has an adapter its magnitudes, in place."""
    module.register_parameter(MAGNITUDE, nn.Parameter(module.weight.detach().new_empty(outputs)))
    module.length_ranks, module.by_inputs = None, is_transposed(module)


def share(model: nn.Module, ranks: Ranks, *, inputs_cut: Collection[str]) -> None:
    """Let ranks that have parts of the inputs of layers, by path, add up the squares of their lengths."""
    for path, module in model.named_modules():
        if path in inputs_cut and MAGNITUDE in module._parameters:
            own: Any = module
            own.length_ranks = ranks


def applied(module: Any, y: Tensor, *, base: Tensor, change: Tensor, scale: float) -> Tensor:
    """The output of a layer that computes y. `base`: its output for the input that `change`, the adapter's
    product, is of.
    """
    factor = module.lora_magnitude_vector / _lengths(module, scale=scale)
    base = base if module.bias is None else base - module.bias
    return y + (factor - 1) * base + factor * change


@torch.no_grad()
def _lengths(module: Any, *, scale: float) -> Tensor:
    """|W + scale B A|, in the dtype of the magnitudes."""
    stored, a, b = quantised.weight_of(module), module.lora_A.weight, module.lora_B.weight
    weight, wide = stored.t() if module.by_inputs else stored, torch.promote_types(a.dtype, torch.float32)
    own = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
    mixed = ((weight @ a.t()).to(wide) * b).sum(1)
    added = ((b @ (a @ a.t())).to(wide) * b).sum(1)
    squares = own + 2 * scale * mixed + scale**2 * added
    if module.length_ranks is not None:
        squares = module.length_ranks.sum(squares)
    return squares.sqrt().to(a.dtype)


def initial(base: WeightSource, path: str, *, module: Any, outputs: slice, dtype: torch.dtype) -> Tensor:
    """Magnitudes of some outputs of a layer whose weight computes in `dtype`. `module`: that on meta."""
    transposed, shape = is_transposed(module), tuple(module.weight.shape)
    slices = (slice(0, shape[0]), outputs) if transposed else (outputs, slice(0, shape[1]))
    weight = base(f"{path}.weight", shape, slices).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=1 - transposed, dtype=wide)


def merged(total: Tensor, magnitude: Tensor, *, transposed: bool) -> Tensor:
    """The weight of a linear layer of which `total` is W + scale B A."""
    rows = total.t() if transposed else total
    factor = (magnitude / torch.linalg.norm(rows, dim=1)).view(-1, 1)
    return (factor.t() if transposed else factor) * total
