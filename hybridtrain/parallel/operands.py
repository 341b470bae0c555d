"""Which part of a module's input and output a tensor-parallel rank counts, so that sums over ranks count each
number once.

    module                                  input x       gradient g of the output
    cut along its outputs (q, k, v, up)     whole         own part
    cut along its inputs (o, down)          own part      whole
    norm over a width that is cut           own part      own part
    other, where ranks compute parts        own part      own part      positions, heads
    other                                   whole         whole

What is whole counts on the first rank alone. Of key/value heads that ranks share, the first of them counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from hybridtrain.models.slicing import Piece, Slicing, pieces
from hybridtrain.models.stage import Stage

Ranges = tuple[tuple[int, int], ...] | None
"""(first, length) of the parts of the last dimension that this rank counts; None: everything."""
ALL: Ranges = None
NOTHING: Ranges = ()


@dataclass(frozen=True)
class Counted:
    """What this rank counts of a module's operands."""

    x: Ranges
    g: Ranges
    y: bool
    heads_shared: bool
    """The output has key/value heads that other ranks have too."""
    of_heads: bool
    """A norm of single heads, whose input may be such heads."""


def counted(stage: Stage, slicing: Slicing, *, rank: int, size: int) -> dict[str, Counted]:
    """Path -> what this rank counts, for the modules of a stage that have parameters of their own."""
    lower = [pieces(stage, slicing, rank=other, size=size) for other in range(rank)] if size > 1 else []
    found = {}
    for path, module in stage.named_modules():
        if next(module.parameters(recurse=False), None) is None:
            continue
        if path == stage.structure.head:
            whole = ALL if rank == 0 or slicing.sequence == "embedding" else NOTHING
            found[path] = Counted(
                whole, NOTHING, y=False, heads_shared=False, of_heads=False
            )  # gives the loss
        else:
            found[path] = _counted(stage, slicing, path, module, rank=rank, lower=lower)
    return found


def own_part(tensor: Tensor, ranges: Ranges) -> list[Tensor]:
    """The parts of a tensor's last dimension that count."""
    if ranges is None:
        return [tensor]
    return [tensor.narrow(-1, first, length) for first, length in ranges]


def _counted(
    stage: Stage,
    slicing: Slicing,
    path: str,
    module: nn.Module,
    *,
    rank: int,
    lower: list[dict[str, Piece]],
) -> Counted:
    whole, inside = ALL if rank == 0 else NOTHING, _inside(stage, path)
    own = {f"{path}.{key}": parameter.dim() for key, parameter in module.named_parameters(recurse=False)}
    cut = [name for name in own if name in stage.pieces and stage.pieces[name].divisor == 1]
    if path == stage.structure.embed:
        positions = bool(cut) and slicing.sequence == "embedding"  # cut by rows, it adds and cuts inside
        return Counted(whole, ALL if positions else whole, y=True, heads_shared=False, of_heads=False)
    if not cut:
        # A router is called with all hidden states, though each rank has a part of its gradient.
        block = any(f"{inside}.".startswith(f"{other}.") for other in slicing.inputs) and inside
        router = bool(block) and max(own.values()) > 1
        parts = not router and any(name in stage.partial for name in own)
        ranges = ALL if parts else whole
        return Counted(ranges, ranges, y=True, heads_shared=False, of_heads=parts and bool(block))
    name = max(cut, key=lambda each: own[each])
    piece, dims = stage.pieces[name], own[name]
    mine = _first_of(piece, [others[name] for others in lower])
    shared = mine is not None
    holds_others = next(module.children(), None) is not None
    if dims > 2 or holds_others:  # experts, attention with sinks: all hidden states in, a part of a sum out
        return Counted(whole, whole, y=True, heads_shared=False, of_heads=False)
    if dims == 1 or inside in slicing.norms:
        return Counted(mine, mine, y=True, heads_shared=shared, of_heads=False)
    outputs = 1 if type(module).__name__ == "Conv1D" else 0  # GPT-2 stores matrices as (in, out)
    if piece.dim == outputs:
        return Counted(whole, mine, y=True, heads_shared=shared, of_heads=False)
    return Counted(mine, whole, y=True, heads_shared=False, of_heads=False)


def _inside(stage: Stage, path: str) -> str:
    """The path inside a layer; empty for a module that is in none."""
    prefix = f"{stage.structure.layers}."
    return path.removeprefix(prefix).partition(".")[2] if path.startswith(prefix) else ""


def _first_of(piece: Piece, lower: Iterable[Piece]) -> Ranges:
    """The ranges, in the rank's own part, that no rank before it has."""
    taken = {each for other in lower for each in other.ranges}
    mine, at = [], 0
    for each in piece.ranges:
        if each not in taken:
            mine.append((at, each[1]))
        at += each[1]
    return ALL if len(mine) == len(piece.ranges) else tuple(mine)
