"""How a model's layers can be cut for tensor parallelism: proposals (proposals.py), each proven on a reduced
copy (probe.py) before it is used. What is not proven stays whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from hybridtrain.analysis import analyse
from hybridtrain.analysis.cache import cached
from hybridtrain.analysis.probe import Failure, Probe
from hybridtrain.analysis.proposals import blocks, proposals
from hybridtrain.config.schema import ParallelConfig
from hybridtrain.models.build import meta_model
from hybridtrain.models.slicing import NOTHING, Slicing, heads_of, piece
from hybridtrain.models.structure import structure_of


def slicing_of(config: Any, *, size: int, sequence: bool) -> Found:
    """The proven slicing of the model of a transformers config for `size` ranks; `sequence`: with sequence
    parallelism, if that is proven. Kept in the user's cache folder.
    """
    question = ["slicing", config.to_json_string(), config._attn_implementation, size, sequence]
    key = repr(question)
    if key not in _FOUND:
        answer = cached(question, compute=lambda: _written(_examined(config, size, sequence)), valid=_valid)
        _FOUND[key] = _read(answer)
    return _FOUND[key]


def slicing_of_layout(config: Any, parallel: ParallelConfig, *, tp: int) -> Slicing:
    """The slicing of a layout of `tp` tensor-parallel ranks."""
    return slicing_of(config, size=tp, sequence=parallel.sequence_parallel).slicing if tp > 1 else NOTHING


@dataclasses.dataclass(frozen=True)
class Found:
    """A slicing, the share of the layers' matrix products that it cuts, and what is not cut -> why."""

    slicing: Slicing
    share: float
    whole: Mapping[str, str]


_FOUND: dict[str, Found] = {}


def _written(found: Found) -> dict[str, Any]:
    return {
        **dataclasses.asdict(found),
        "slicing": {**dataclasses.asdict(found.slicing), "partial": sorted(found.slicing.partial)},
    }


def _read(answer: Mapping[str, Any]) -> Found:
    fields = dict(answer["slicing"])
    for name in ("inputs", "outputs", "norms", "configs"):
        fields[name] = tuple(fields[name])
    fields["divided"] = {path: tuple(names) for path, names in fields["divided"].items()}
    fields["partial"] = frozenset(fields["partial"])
    return Found(Slicing(**fields), answer["share"], answer["whole"])


def _valid(answer: Mapping[str, Any]) -> bool:
    try:
        _read(answer)
    except (KeyError, TypeError, AttributeError):
        return False
    return True


def _examined(config: Any, size: int, sequence: bool) -> Found:
    """Search on a reduced copy, without blocks that the model's own sizes do not allow to cut."""
    copy = analyse.copy_of(config, tp=size)
    model, layers = meta_model(config), structure_of(config).layers
    without: dict[str, str] = {}
    while True:
        slicing, whole = search(copy, size=size, sequence=sequence, without=without)
        problems = _too_uneven(model, slicing, layers=layers, heads=heads_of(config), size=size)
        if not problems:
            return Found(slicing, share_of_products(model, slicing, layers=layers), {**whole, **without})
        without |= {
            block.name: problems[path]
            for block in blocks(copy)
            for path in problems
            if path in block.parameters()
        }


def _too_uneven(
    model: Any, slicing: Slicing, *, layers: str, heads: tuple[int, int], size: int
) -> dict[str, str]:
    """Parameters of a model on meta that cannot be shared out evenly -> why."""
    problems = {}
    for name, parameter in model.named_parameters():
        path = name.removeprefix(f"{layers}.").partition(".")[2]
        if name.startswith(f"{layers}.") and path in slicing.cuts:
            try:
                piece(slicing.cuts[path], tuple(parameter.shape), heads=heads, rank=0, size=size)
            except ValueError as error:
                problems[path] = str(error)
    return problems


def search(
    copy: analyse.Copy, *, size: int, sequence: bool, without: Mapping[str, str]
) -> tuple[Slicing, dict[str, str]]:
    """(the slicing of a reduced copy that is proven for `size` ranks, block -> why it is not cut)."""
    probe = Probe(copy, size=size)
    found, whole = [], {}
    for block in blocks(copy):
        if block.name in without:
            continue
        try:
            found.append(_first_proven(probe, proposals(block, copy)))
        except Failure as failure:
            whole[block.name] = str(failure)
    slicing = _joined(found)
    try:
        slicing = probe.prove(slicing)
    except Failure as failure:
        whole["all"] = str(failure)
        slicing = probe.prove(found[0]) if found else NOTHING
    try:
        slicing = probe.prove(dataclasses.replace(slicing, vocabulary=True))
    except Failure as failure:
        whole["vocabulary"] = str(failure)
    if not sequence:
        return slicing, whole
    for where in ("embedding", "layers"):
        try:
            return probe.prove(dataclasses.replace(slicing, sequence=where)), whole
        except Failure as failure:
            whole["sequence"] = str(failure)
    return slicing, whole


def _first_proven(probe: Probe, candidates: Iterator[Slicing]) -> Slicing:
    """Raises Failure with the reason of the first that failed."""
    first, computes = Failure("no columns and rows were found"), {}
    tried = False
    for slicing in candidates:
        forward = dataclasses.replace(slicing, inputs=())  # inputs change gradients alone
        key = repr(forward)
        try:
            if key not in computes:
                computes[key] = None
                probe.forward(forward)
            elif computes[key] is not None:
                continue
            return probe.prove(slicing)
        except Failure as failure:
            if key in computes and computes[key] is None:
                computes[key] = failure
            first = first if tried else failure
            tried = True
    raise first


def _joined(slicings: list[Slicing]) -> Slicing:
    return Slicing(
        {name: cut for each in slicings for name, cut in each.cuts.items()},
        tuple(dict.fromkeys(path for each in slicings for path in each.inputs)),
        tuple(dict.fromkeys(path for each in slicings for path in each.outputs)),
        tuple(dict.fromkeys(path for each in slicings for path in each.norms)),
        {path: names for each in slicings for path, names in each.divided.items()},
        tuple(dict.fromkeys(path for each in slicings for path in each.configs)),
        False,
        "",
        frozenset(),
    )


def share_of_products(model: Any, slicing: Slicing, *, layers: str) -> float:
    """The part of the matrix products of a forward pass that is cut, of a model on meta."""
    total = cut = 0
    counted: Mapping[str, Any] = dict(model.named_parameters())
    for name, parameter in counted.items():
        if not name.startswith(f"{layers}.") or parameter.dim() < 2:
            continue
        total += parameter.numel()
        cut += parameter.numel() if name.removeprefix(f"{layers}.").partition(".")[2] in slicing.cuts else 0
    return cut / total if total else 0.0
