"""Proposals of slicings (models/slicing.py) for a model, from the names and shapes of its parameters.

A block is a module in a layer with matrices that lead from the hidden states to a width (columns) and back
(rows). Attention is recognized by names, everything else by shapes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from torch import nn

from hybridtrain.analysis.analyse import Copy
from hybridtrain.models.slicing import NOTHING, Slicing, heads_of
from hybridtrain.models.structure import structure_of

_QUERY = {"q_proj", "query", "q", "wq", "q_b_proj", "q_lin", "query_proj"}
_KEY_VALUE = {"k_proj", "v_proj", "key", "value", "k", "v", "wk", "wv", "k_lin", "v_lin"}
_BOTH = {"kv_b_proj"}
_FUSED = {"qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "W_pack", "qkv_lin"}
_OUT = {"o_proj", "out_proj", "dense", "c_proj", "wo", "o", "out", "out_lin", "o_b_proj", "Wo"}
_GATES = {"gate_proj", "g_proj", "gate", "attn_gate", "output_gate"}
_HIDDEN_IN = {"gate", "router"}
_EXPERT_IN = ("gate_up", "gate", "up", "w1", "w3", "input", "fc1", "wi")


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A parameter of two or three dimensions, by what it leads from and to."""

    name: str
    leaf: str
    """Name of its module, or of itself where a module has several."""
    shape: tuple[int, ...]
    dim_in: int
    dim_out: int

    @property
    def size_in(self) -> int:
        return self.shape[self.dim_in]

    @property
    def size_out(self) -> int:
        return self.shape[self.dim_out]


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of the layers that is cut or not."""

    kind: str
    """attention or mlp."""
    path: str
    """Of its module in a layer; empty for matrices of the layer itself."""
    modules: tuple[Any, ...]
    """Those of the layers that have it; layers of several kinds may have different ones at the same path."""
    matrices: tuple[Matrix, ...]

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.kind} {self.path}".strip()

    def parameters(self) -> dict[str, Any]:
        """Path in a layer -> parameter."""
        return {n: p for module in self.modules for n, p in module.named_parameters(prefix=self.path)}

    def parts(self) -> dict[str, Any]:
        """Path in a layer -> module."""
        return {n: m for module in self.modules for n, m in module.named_modules(prefix=self.path)}


def _hidden(copy: Copy) -> int:
    """Width of the hidden states; an embedding may be narrower."""
    return copy.config.get_text_config(decoder=True).hidden_size


def blocks(copy: Copy) -> list[Block]:
    """The blocks of all layers; the same path in several layers is one block."""
    hidden = _hidden(copy)
    listed = copy.model.get_submodule(structure_of(copy.config).layers)
    found: dict[tuple[str, str], Block] = {}
    for layer in listed:
        loose: list[Matrix] = []
        for path, child in layer.named_children():
            inside = tuple(matrices(child, prefix=path))
            block = Block(_kind(inside), path, (child,), inside)
            if block.kind == "mlp" and not _paired(block, hidden=hidden):
                loose += inside
            elif inside:
                _add(found, block)
        if loose:
            _add(found, Block("mlp", "", (layer,), tuple(loose)))
    return list(found.values())


def _add(found: dict[tuple[str, str], Block], block: Block) -> None:
    key = (block.kind, block.path)
    if key in found:
        known = {matrix.name: matrix for matrix in found[key].matrices}
        both = tuple({**known, **{matrix.name: matrix for matrix in block.matrices}}.values())
        modules = (*found[key].modules, *block.modules)
        block = dataclasses.replace(found[key], matrices=both, modules=modules)
    found[key] = block


def _kind(inside: tuple[Matrix, ...]) -> str:
    names = {matrix.leaf for matrix in inside}
    return "attention" if names & (_FUSED | _QUERY) and names & (_FUSED | _KEY_VALUE | _BOTH) else "mlp"


def matrices(module: nn.Module, *, prefix: str) -> Iterator[Matrix]:
    """The matrices inside a module."""
    for path, each in module.named_modules(prefix=prefix):
        own = list(each.named_parameters(recurse=False))
        for key, parameter in own:
            shape = tuple(parameter.shape)
            if len(shape) < 2 or len(shape) > 3 or "Conv1d" in type(each).__name__:
                continue
            leaf = path.rpartition(".")[2] if key == "weight" else key
            dims = (len(shape) - 2, len(shape) - 1)
            if type(each).__name__ == "Conv1D":  # stored as (in, out)
                yield Matrix(f"{path}.{key}", leaf, shape, *dims)
            else:
                yield Matrix(f"{path}.{key}", leaf, shape, dims[1], dims[0])


def _oriented(matrix: Matrix, *, hidden: int) -> Matrix:
    """Experts are stored either way round: the names tell what they lead to."""
    if len(matrix.shape) < 3:
        return matrix
    into = matrix.leaf.startswith(_EXPERT_IN) or any(f".{word}" in matrix.name for word in _EXPERT_IN)
    known = matrix.size_in if into else matrix.size_out
    if known == hidden:
        return matrix
    return dataclasses.replace(matrix, dim_in=matrix.dim_out, dim_out=matrix.dim_in)


def _owner(matrix: Matrix) -> str:
    """The module that calls a matrix: that of a module's weight is the module around it."""
    path = matrix.name.rpartition(".")[0]
    return path.rpartition(".")[0] if matrix.name.endswith(".weight") else path


def _paired(block: Block, *, hidden: int) -> tuple[list[Matrix], list[Matrix], list[Matrix]] | None:
    """(columns, those of them that are two in one, rows): matrices from the hidden states to a width, or
    twice the width, and back from it. They belong to one module, or else only to one block.
    """
    inside = [_oriented(m, hidden=hidden) for m in block.matrices if m.leaf not in _HIDDEN_IN]
    backs = [m for m in inside if m.size_out == hidden]
    columns, double, rows = [], [], []
    for matrix in inside:
        near = [m for m in backs if _owner(m) == _owner(matrix) and m is not matrix]
        widths = {m.size_in for m in near or backs if m is not matrix}
        if matrix.size_in != hidden or matrix in rows or not {matrix.size_out, matrix.size_out / 2} & widths:
            continue
        columns.append(matrix)
        twice = matrix.size_out not in widths
        double += [matrix] if twice else []
        width = matrix.size_out // 2 if twice else matrix.size_out
        rows += [m for m in near or backs if m.size_in == width and m not in rows]
    return (columns, double, rows) if columns and rows else None


# -- proposals -----------------------------------------------------------------------------------------------


def proposals(block: Block, copy: Copy) -> Iterator[Slicing]:
    """Slicings of one block, the likely and fast ones first."""
    hidden = _hidden(copy)
    found = _attention(block, copy) if block.kind == "attention" else _mlp(block, copy, hidden=hidden)
    for slicing, columns, rows in found:
        inner = tuple(dict.fromkeys(m.name.rpartition(".")[0] for m in rows))
        outer = tuple(dict.fromkeys(m.name.rpartition(".")[0] for m in columns))
        whole = (block.path,) if block.path else ()
        ways = [(whole, whole), (whole, inner), (outer, inner)] if whole else [(outer, inner)]
        for inputs, outputs in ways:
            yield dataclasses.replace(slicing, inputs=inputs, outputs=outputs)


Proposal = tuple[Slicing, list[Matrix], list[Matrix]]


def _attention(block: Block, copy: Copy) -> Iterator[Proposal]:
    heads = heads_of(copy.config)
    out = [m for m in block.matrices if m.leaf in _OUT]
    homes = {_owner(m) for m in out}
    inside = [m for m in block.matrices if _owner(m) in homes]
    named = _QUERY | _KEY_VALUE | _BOTH | _FUSED
    if not any(m.leaf in named for m in inside):
        inside = list(block.matrices)  # the way out is in a module of its own
    width = {m.size_in for m in out}
    fused = [m for m in inside if m.leaf in _FUSED]
    ways = ("q", "q kv kv", "e e e") if fused else ("q",)
    for way, divided in itertools.product(ways, ("", "heads", "widths", "config")):
        cuts: dict[str, str] = {}
        columns = []
        for matrix in inside:
            kinds = way if matrix in fused else "kv" if matrix.leaf in _KEY_VALUE else "q"
            gate = matrix.leaf in _GATES and matrix.size_out in {*width, heads[0]}
            if matrix in out:
                _cut(cuts, matrix, dim=matrix.dim_in, kinds="q", block=block)
            elif gate or matrix.leaf in named:
                columns.append(matrix)
                _cut(cuts, matrix, dim=matrix.dim_out, kinds=kinds, block=block)
        norms = _per_head(cuts, block, columns=columns, heads=heads)
        if columns and out:
            attributes = _attributes(block, divided, copy, columns=columns, rows=out)
            yield dataclasses.replace(NOTHING, cuts=cuts, norms=norms, **attributes), columns, out


def _mlp(block: Block, copy: Copy, *, hidden: int) -> Iterator[Proposal]:
    if (pair := _paired(block, hidden=hidden)) is None:
        return
    columns, double, rows = pair
    for way, divided in itertools.product(["e e", ""] if double else [""], ("", "widths")):
        cuts: dict[str, str] = {}
        for matrix in columns:
            _cut(cuts, matrix, dim=matrix.dim_out, kinds=way if matrix in double else "", block=block)
        for matrix in rows:
            _cut(cuts, matrix, dim=matrix.dim_in, kinds="", block=block)
        norms = _per_head(cuts, block, columns=columns, heads=None)
        attributes = _attributes(block, divided, copy, columns=columns, rows=rows)
        yield dataclasses.replace(NOTHING, cuts=cuts, norms=norms, **attributes), columns, rows


def _cut(cuts: dict[str, str], matrix: Matrix, *, dim: int, kinds: str, block: Block) -> None:
    """Add a matrix and its bias."""
    suffix = f":{kinds}" if kinds else ""
    cuts[matrix.name] = f"{dim}{suffix}"
    stem = matrix.name.removesuffix("weight")
    for name, parameter in block.parameters().items():
        if name in (f"{stem}bias", f"{matrix.name}_bias", f"{matrix.name}.bias"):
            shape = tuple(parameter.shape)
            row = dim == matrix.dim_in
            cuts[name] = "share" if row else f"{len(shape) - 1}{suffix}"


def _per_head(
    cuts: dict[str, str], block: Block, *, columns: list[Matrix], heads: tuple[int, int] | None
) -> tuple[str, ...]:
    """Cut vectors with a value for each head, or for each element of all heads: those are norms, returned."""
    wide = {matrix.size_out: cuts[matrix.name].partition(":")[2] for matrix in columns}
    norms = []
    for name, parameter in block.parameters().items():
        if parameter.dim() != 1 or name in cuts:
            continue
        if heads is not None and parameter.shape[0] == heads[0]:
            cuts[name] = "0:q"
        elif parameter.shape[0] in wide and "norm" in name:
            kinds = wide[parameter.shape[0]]
            cuts[name] = f"0:{kinds}" if kinds else "0"
            norms.append(name.rpartition(".")[0])
    return tuple(norms)


def _attributes(
    block: Block, divided: str, copy: Copy, *, columns: list[Matrix], rows: list[Matrix]
) -> dict[str, Any]:
    """Fields of a Slicing for numbers that modules of the block keep."""
    named = block.parts()
    owners = {m.name.rpartition(".")[0] for m in block.matrices if m.name.endswith("weight")}
    found = {
        path: ("nf",)  # a Conv1D has its output's width as an attribute
        for path in (m.name.rpartition(".")[0] for m in columns)
        if "nf" in vars(named[path])
    }
    configs = tuple(path for path, m in named.items() if divided == "config" and hasattr(m, "config"))
    if not divided:
        return {"divided": found}
    heads = heads_of(copy.config)
    widths = {m.size_out for m in columns} | {m.size_in for m in rows}
    if block.kind == "mlp":
        numbers = widths - {_hidden(copy), *heads}
    else:
        numbers = {*heads, *(widths if divided == "widths" else ())}
    for path, module in named.items():
        names = tuple(
            key
            for key, value in vars(module).items()
            if isinstance(value, int) and not isinstance(value, bool) and value in numbers
        )
        if names and path not in owners:
            found[path] = names
    return {"divided": found, "configs": configs}
