"""Tensor parallelism of a stage by its parameters: each rank's layers compute with a part of them, in the
model's own forward, and their results are added.

    hidden -> input -> q, k, v: rows of this rank's heads -> attention -> o: columns -> output: summed
    hidden -> input -> gate, up: rows                     -> down: columns           -> output: summed

Which parameters are cut, and how, is a `Slicing`: analysis/slices.py proposes it for a model, and proves it.
A parameter inside a block that is not cut, such as a norm of heads, has a part of its gradient on each rank;
`Slicing.partial` names those whose gradients are to be added.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hybridtrain.models import classifier
from hybridtrain.models.reduced import first_layer
from hybridtrain.models.stage import Stage
from hybridtrain.runtime.collectives import Ranks, collective


@dataclass(frozen=True)
class Slicing:
    """How the layers of a model are cut. Paths of parameters and modules are those inside a layer."""

    cuts: Mapping[str, str]
    """Parameter -> how it is cut: "1", equal parts of that dimension; "0:kv", of the key/value heads, which
    ranks share where they are fewer; "0:q kv kv" or "0:e e", of each of the matrices stored in one; "share",
    an equal share of the value (a bias that is added on every rank)."""
    inputs: tuple[str, ...]
    """Modules whose hidden states come from outside the cut part."""
    outputs: tuple[str, ...]
    """Modules whose result is a part of a sum over ranks."""
    norms: tuple[str, ...]
    """Norms over a width that is cut."""
    divided: Mapping[str, tuple[str, ...]]
    """Module -> attributes with numbers of heads or widths, of which a rank has its part."""
    configs: tuple[str, ...]
    """Modules that get a config of their own, with this rank's number of heads."""
    vocabulary: bool
    """Whether embedding and head are cut, by rows."""
    sequence: str
    """Where sequence parallelism has hidden states cut by positions: from "embedding" to head, or in the
    "layers"; "" for none."""
    partial: frozenset[str]
    """Parameters that are not cut, of which each rank computes a part of the gradient; those outside layers
    by their whole path."""
    dropped: tuple[str, ...]
    """Modules that drop elements of channels or heads of which a rank has its part."""


NOTHING = Slicing({}, (), (), (), {}, (), False, "", frozenset(), ())


@dataclass(frozen=True)
class Piece:
    """What a rank uses of a parameter."""

    dim: int
    ranges: tuple[tuple[int, int], ...]
    """(first, length) along `dim`; none: the whole parameter."""
    stored: bool
    """Whether the rank also stores only that; the pieces of all ranks then follow each other, as torch.chunk
    cuts."""
    divisor: int

    def of(self, whole: Tensor) -> Tensor:
        """The piece of a whole parameter, differentiable."""
        if self.divisor > 1:
            return whole / self.divisor
        parts = [whole.narrow(self.dim, first, length) for first, length in self.ranges]
        return whole if not parts else parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.dim)


WHOLE = Piece(0, (), False, 1)


def piece(cut: str, shape: tuple[int, ...], *, heads: tuple[int, int], rank: int, size: int) -> Piece:
    """This rank's piece of a parameter. `heads`: numbers of query and of key/value heads.

    Raises ValueError for what cannot be shared out evenly.
    """
    if cut == "share":
        return Piece(0, (), False, size)
    dim, _, kinds = cut.partition(":")
    parts, of_kind = kinds.split() or ["e"], {"q": heads[0], "kv": heads[1], "e": 1}
    ranges, first = [], 0
    for kind, length in zip(parts, lengths(shape[int(dim)], parts, heads=heads), strict=True):
        unit = length // of_kind[kind]
        if kind == "kv" and heads[1] < size:
            if size % heads[1]:
                raise ValueError(f"{heads[1]} key/value heads for {size} ranks")
            ranges.append((first + rank * heads[1] // size * unit, unit))
        else:
            if length % size or (kind in ("q", "kv") and of_kind[kind] % size):
                raise ValueError(f"{of_kind[kind] if kind != 'e' else length} for {size} ranks")
            ranges.append((first + rank * length // size, length // size))
        first += length
    return Piece(int(dim), tuple(ranges), len(parts) == 1 and ranges[0][1] * size == first, 1)


def lengths(size: int, parts: Sequence[str], *, heads: tuple[int, int]) -> tuple[int, ...]:
    """Lengths of the matrices stored in one, of kinds as in Slicing.cuts. Raises ValueError."""
    of_kind = {"q": heads[0], "kv": heads[1], "e": 1}
    unit, rest = divmod(size, sum(of_kind[kind] for kind in parts))
    if rest:
        raise ValueError(f"{size} is no multiple of the parts {' '.join(parts)}")
    return tuple(unit * of_kind[kind] for kind in parts)


def heads_of(config: Any) -> tuple[int, int]:
    """Numbers of query and of key/value heads, of the first layer."""
    first = first_layer(config.get_text_config(decoder=True))
    heads = getattr(first, "num_attention_heads", None) or 1
    return heads, getattr(first, "num_key_value_heads", None) or heads


def pieces(stage: Stage, slicing: Slicing, *, rank: int, size: int) -> dict[str, Piece]:
    """Parameter of the stage -> this rank's piece, for those that are cut. Raises ValueError."""
    heads, found = heads_of(stage.config), {}
    parameters = dict(stage.named_parameters())
    for name in _vocabulary(stage, slicing) & parameters.keys():
        rows = rows_of_vocabulary(parameters[name].shape[0], rank=rank, size=size)
        found[name] = Piece(0, (rows,), True, 1)
    for index, layer in stage.layer_modules():
        for name, parameter in layer.named_parameters():
            if name in slicing.cuts:
                path = f"{stage.structure.layers}.{index}.{name}"
                shape = tuple(parameter.shape)
                try:
                    found[path] = piece(slicing.cuts[name], shape, heads=heads, rank=rank, size=size)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error
    return found


def _vocabulary(stage: Stage, slicing: Slicing) -> set[str]:
    """Names of the parameters that are cut by rows of the vocabulary."""
    structure = stage.structure
    names = {f"{structure.embed}.weight"} if slicing.vocabulary else set()
    if head_is_cut(stage, slicing):
        names |= {f"{structure.head}.weight", f"{structure.head}.bias"}
    return names


def rows_of_vocabulary(entries: int, *, rank: int, size: int) -> tuple[int, int]:
    """(first, number) of this rank's rows of embedding and head, as torch.chunk cuts them."""
    most = -(-entries // size)
    first = min(rank * most, entries)
    return first, min(most, entries - first)


def partial_gradients(stage: Stage, slicing: Slicing) -> set[str]:
    """Names of the stage's parameters whose gradients are to be added over ranks."""
    prefix = f"{stage.structure.layers}."
    inside = {
        f"{prefix}{index}.{name}"
        for index, layer in stage.layer_modules()
        for name, _ in layer.named_parameters()
        if name in slicing.partial
    }
    return inside | {name for name, _ in stage.named_parameters() if name in slicing.partial}


def rewire(stage: Stage, slicing: Slicing, ranks: Ranks) -> None:
    """Let a stage whose parameters are cut exchange what its layers need, in place."""
    stage.dropouts.share(ranks.rank, cut=slicing.dropped)
    for _, layer in stage.layer_modules():
        cut = {name for name, _ in layer.named_parameters() if name in slicing.cuts}
        _rewire_layer(layer, slicing, ranks, cut=cut, heads=heads_of(stage.config))
    structure = stage.structure
    if stage.first or structure.embed in structure.shared:
        embed: Any = stage.part(structure.embed)
        scatters = slicing.sequence == "embedding"
        if slicing.vocabulary:
            _embed_rows(embed, ranks, entries=embed.weight.shape[0], scatters=scatters)
        elif scatters:
            embed.register_forward_hook(partial(_leave, "split", ranks), with_kwargs=True)
        if slicing.sequence == "layers" and stage.first:
            first = stage.part(f"{stage.structure.layers}.{stage.layers[0]}")
            first.register_forward_pre_hook(partial(_enter, "split", ranks), with_kwargs=True)
    if stage.last:
        if slicing.sequence == "layers":
            last = stage.part(f"{stage.structure.layers}.{stage.layers[-1]}")
            last.register_forward_hook(partial(_leave, "whole", ranks), with_kwargs=True)
        head: Any = stage.part(stage.structure.head)
        head.share(ranks, rows=head_is_cut(stage, slicing), positions=slicing.sequence == "embedding")


def head_is_cut(stage: Stage, slicing: Slicing) -> bool:
    """A classifier's head has few rows, and stays whole."""
    return slicing.vocabulary and not classifier.is_classifier(stage.config.architectures)


def _rewire_layer(
    layer: nn.Module, slicing: Slicing, ranks: Ranks, *, cut: set[str], heads: tuple[int, int]
) -> None:
    enter, leave = ("gather", "scatter") if slicing.sequence else ("copy", "sum")
    paths = {path for path, _ in layer.named_modules()}

    def used(path: str) -> bool:
        """Layers of several kinds may have other modules of the same name."""
        return path in paths and any(name.startswith(f"{path}.") or not path for name in cut)

    for path in filter(used, slicing.inputs):
        layer.get_submodule(path).register_forward_pre_hook(partial(_enter, enter, ranks), with_kwargs=True)
    for path in filter(used, slicing.norms):
        layer.get_submodule(path).register_forward_hook(partial(_whole_width, ranks))
    for path in filter(used, slicing.outputs):
        layer.get_submodule(path).register_forward_hook(partial(_leave, leave, ranks), with_kwargs=True)
    for path, names in slicing.divided.items():
        if used(path):
            module: Any = layer.get_submodule(path)
            for name in names:
                if name in vars(module):
                    setattr(module, name, max(1, getattr(module, name) // ranks.size))
    for path in filter(used, slicing.configs):
        module = layer.get_submodule(path)
        module.config = copy.copy(module.config)
        module.config.num_attention_heads = heads[0] // ranks.size
        if getattr(module.config, "num_key_value_heads", None):
            module.config.num_key_value_heads = max(1, heads[1] // ranks.size)
    if ranks.size > heads[1]:  # each rank has one key/value head
        of_keys = {name for name in cut if "kv" in slicing.cuts[name]}
        for path in {name.rpartition(".")[0].rpartition(".")[0] for name in of_keys}:
            module = layer.get_submodule(path)
            if hasattr(module, "num_key_value_groups"):
                module.num_key_value_groups = heads[0] // ranks.size


def _enter(name: str, ranks: Ranks, module: nn.Module, given: Any, options: Any) -> Any:  # noqa: ARG001
    """A hook before a module: its hidden states are the first argument, or the first tensor by name."""
    if given:
        return (collective(name, given[0], ranks), *given[1:]), options
    key = "hidden_states" if "hidden_states" in options else next(iter(options))
    return given, {**options, key: collective(name, options[key], ranks)}


def _leave(name: str, ranks: Ranks, module: nn.Module, given: Any, options: Any, result: Any) -> Any:  # noqa: ARG001
    """A hook after a module: its hidden states are the result, or the first of it."""
    if isinstance(result, Tensor):
        return collective(name, result, ranks)
    return type(result)((collective(name, result[0], ranks), *result[1:]))


def _whole_width(ranks: Ranks, module: Any, given: Any, result: Tensor) -> Tensor:
    """A hook after a norm by the root mean square, which saw this rank's part of the width."""
    epsilon: float = getattr(module, "variance_epsilon", None) or module.eps
    mine = given[0].float().square().mean(-1, keepdim=True)
    mean = collective("both", mine, ranks) / ranks.size
    return (result.float() * ((mine + epsilon).sqrt() * (mean + epsilon).rsqrt())).to(result.dtype)


def _embed_rows(embed: Any, ranks: Ranks, *, entries: int, scatters: bool) -> None:
    """Let an embedding look up the tokens whose rows it has, and add the others."""
    first, count = rows_of_vocabulary(entries, rank=ranks.rank, size=ranks.size)
    if embed.padding_idx is not None:  # the row without a gradient
        own = 0 <= embed.padding_idx - first < count
        embed.padding_idx = embed.padding_idx - first if own else None

    lookup: Callable[..., Tensor] = embed.forward

    def forward(ids_BT: Tensor, *given: Any) -> Tensor:
        place = ids_BT - first
        mine = (place >= 0) & (place < count)
        if count:
            found = lookup(place.where(mine, 0), *given) * mine.unsqueeze(-1)
        else:  # more ranks than rows
            found = embed.weight.sum().expand(*ids_BT.shape, embed.weight.shape[1])
        return collective("scatter" if scatters else "sum", found, ranks)

    embed.forward = forward


class Local:
    """A module's forward, run with other tensors in place of its parameters.

    `slots`: (table of a module's parameters, name in it, parameter -> tensor to use). The modules read them
    as always; outside of the forward the parameters are there.
    """

    def __init__(
        self, forward: Callable[..., Any], slots: Sequence[tuple[Any, str, Callable[[Any], Tensor]]]
    ):
        self.forward, self.slots = forward, slots

    def __call__(self, *given: Any, **options: Any) -> Any:
        kept = [table[name] for table, name, _ in self.slots]
        try:
            for (table, name, local), parameter in zip(self.slots, kept, strict=True):
                table[name] = local(parameter)
            return self.forward(*given, **options)
        finally:
            for (table, name, _), parameter in zip(self.slots, kept, strict=True):
                table[name] = parameter
