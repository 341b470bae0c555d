"""Which parameters of a model are matrices for optim=muon, and where one holds several."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from hybridtrain.analysis.proposals import matrices
from hybridtrain.analysis.slices import WITHOUT_SEQUENCE, slicing_of
from hybridtrain.models import plain
from hybridtrain.models.build import meta_model
from hybridtrain.models.slicing import heads_of, lengths
from hybridtrain.models.structure import structure_of

Parts = tuple[int, tuple[int, ...]]
"""(dimension, lengths) of the matrices that follow each other in one parameter; experts, the first of three
dimensions, are apart from each other anyway."""


def of_model(config: Any) -> dict[str, Parts]:
    """Name -> parts of the weights of linear layers and experts inside the layers of a model. Embedding,
    head, norms, routers of a kind of their own and tables are none.

    Where one parameter holds several that follow each other, such as query, key and value, is what tensor
    parallelism of two ranks has proven; where that is not proven, or they are interleaved, it counts as one.
    """
    model, layers = meta_model(config), structure_of(config).layers
    cuts = {} if config.model_type in plain.TYPES else _cuts(config)
    found: dict[str, Parts] = {}
    heads = heads_of(config)
    for index, layer in enumerate(model.get_submodule(layers).children()):
        modules = dict(layer.named_modules())
        for matrix in matrices(layer, prefix=""):
            name = matrix.name.lstrip(".")
            path = name.rpartition(".")[0]
            if _is_matrix(path, modules[path], dimensions=len(matrix.shape)):
                found[f"{layers}.{index}.{name}"] = _parts(cuts.get(name, ""), matrix.shape, heads=heads)
    return found


def _is_matrix(path: str, module: nn.Module, *, dimensions: int) -> bool:
    """Whether a parameter of a module is the weight of a linear layer, or those of experts, not a norm over
    heads, a table, or a state matrix.
    """
    kind = type(module).__name__
    if dimensions == 2:
        return isinstance(module, nn.Linear) or kind == "Conv1D"
    return "expert" in f"{path} {kind}".lower()


def _cuts(config: Any) -> dict[str, str]:
    return dict(slicing_of(config, size=2, kind=WITHOUT_SEQUENCE).slicing.cuts)


def _parts(cut: str, shape: tuple[int, ...], *, heads: tuple[int, int]) -> Parts:
    dim, _, kinds = cut.partition(":")
    if not re.fullmatch(r"\d+:.* .*", cut):
        return len(shape) - 2, (shape[-2],)
    return int(dim), lengths(shape[int(dim)], kinds.split(), heads=heads)
