"""How a model's layers can be cut for tensor parallelism: proposals (proposals.py), each proven on a reduced
copy (probe.py) before it is used. What is not proven stays whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from hybridtrain.analysis import analyse
from hybridtrain.analysis.cache import cached
from hybridtrain.analysis.probe import Failure, Probe
from hybridtrain.analysis.proposals import Block, blocks, proposals
from hybridtrain.models.build import language_model, meta_model
from hybridtrain.models.reduced import experts_of
from hybridtrain.models.slicing import NOTHING, Slicing, heads_of, piece
from hybridtrain.models.structure import structure_of

WITH_SEQUENCE, WITHOUT_SEQUENCE, LINEARS = "sequence", "plain", "linears"
"""Kinds of slicings: with sequence parallelism where that is proven; without; of linear layers alone, each
with collectives of its own, as the layers of DeepSpeed's AutoTP."""


def slicing_of(config: Any, *, size: int, kind: str) -> Found:
    """The proven slicing of the model of a transformers config for `size` ranks. Kept in the user's cache
    folder. A classifier is cut as the language model with its layers.
    """
    config = language_model(config)
    question = ["slicing", config.to_json_string(), config._attn_implementation, size, kind]
    key = repr(question)
    if key not in _FOUND:
        answer = cached(question, compute=lambda: _written(_examined(config, size, kind)), valid=_valid)
        _FOUND[key] = _read(answer)
    return _FOUND[key]


def slicing_of_layout(config: Any, *, tp: int, sequence: bool) -> Slicing:
    """The slicing of a layout of `tp` tensor-parallel ranks; `sequence`: along the sequence too, if that is
    proven.
    """
    kind = WITH_SEQUENCE if sequence else WITHOUT_SEQUENCE
    return slicing_of(config, size=tp, kind=kind).slicing if tp > 1 else NOTHING


def slicing_for_linears(config: Any, *, tp: int) -> Slicing:
    """The slicing of `tp` ranks with AutoTP's layers."""
    return slicing_of(config, size=tp, kind=LINEARS).slicing if tp > 1 else NOTHING


@dataclasses.dataclass(frozen=True)
class Found:
    """A slicing that is proven."""

    slicing: Slicing
    share: float
    """Of the layers' matrix products."""
    stored: float
    """The part of the layers' parameters of which a rank stores only its own."""
    cut: tuple[str, ...]
    """Names of the blocks that are cut."""
    whole: Mapping[str, str]
    """What is not cut -> why: blocks, vocabulary, sequence."""


_FOUND: dict[str, Found] = {}


def _written(found: Found) -> dict[str, Any]:
    return {
        **dataclasses.asdict(found),
        "slicing": {**dataclasses.asdict(found.slicing), "partial": sorted(found.slicing.partial)},
    }


def _read(answer: Mapping[str, Any]) -> Found:
    fields = dict(answer["slicing"])
    for name in ("inputs", "outputs", "norms", "configs", "dropped"):
        fields[name] = tuple(fields[name])
    fields["divided"] = {path: tuple(names) for path, names in fields["divided"].items()}
    fields["partial"] = frozenset(fields["partial"])
    return Found(Slicing(**fields), answer["share"], answer["stored"], tuple(answer["cut"]), answer["whole"])


def _valid(answer: Mapping[str, Any]) -> bool:
    try:
        _read(answer)
    except (KeyError, TypeError, AttributeError):
        return False
    return True


def _examined(config: Any, size: int, kind: str) -> Found:
    """Search on a reduced copy, without blocks that the model's own sizes do not allow to cut."""
    try:
        small = analyse.copy_of(config, tp=size)
    except Exception as error:  # sizes that this architecture does not accept
        return Found(NOTHING, 0.0, 0.0, (), {"all": analyse.words(error)})
    probe = Probe(small, size=size)
    model, layers = meta_model(config), structure_of(config).layers
    without: dict[str, str] = {}
    while True:
        slicing, cut, whole = search(probe, kind=kind, without=without)
        problems = _too_uneven(model, slicing, layers=layers, heads=heads_of(config), size=size)
        if not problems:
            share = share_of_products(model, slicing, layers=layers)
            stored = share_of_storage(model, slicing, layers=layers, size=size)
            return Found(slicing, share, stored, cut, {**whole, **without})
        without |= {
            block.name: problems[path]
            for block in blocks(small)
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
    probe: Probe, *, kind: str, without: Mapping[str, str]
) -> tuple[Slicing, tuple[str, ...], dict[str, str]]:
    """(the proven slicing of a reduced copy, names of its blocks, what is not cut -> why)."""
    copy, slicing, whole = probe.copy, NOTHING, {}
    names: list[str] = []
    for block in blocks(copy):
        if block.name in without:
            continue
        try:
            alone = _first_proven(probe, _candidates(block, copy, kind=kind))
            # Blocks that are right alone are right together, or the later one stays whole.
            slicing = probe.prove(joined(slicing, alone)) if names else alone
            names.append(block.name)
        except Failure as failure:
            whole[block.name] = str(failure)
    if kind == LINEARS:
        return slicing, tuple(names), whole
    wanted = [dataclasses.replace(slicing, vocabulary=True)]
    if kind == WITH_SEQUENCE:
        wanted = [
            dataclasses.replace(slicing, vocabulary=vocabulary, sequence=sequence)
            for sequence in ("embedding", "layers", "")
            for vocabulary in (True, False)
        ]
    reasons: dict[str, str] = {}
    for each in wanted:
        try:
            proven = probe.prove(each)
            done = {"sequence": bool(each.sequence), "vocabulary": each.vocabulary}
            whole |= {name: why for name, why in reasons.items() if not done[name]}
            return proven, tuple(names), whole
        except Failure as failure:
            reasons.setdefault("sequence" if each.sequence else "vocabulary", str(failure))
    return slicing, tuple(names), whole | reasons


def _candidates(block: Block, copy: analyse.Copy, *, kind: str) -> Iterator[Slicing]:
    """The proposals for a block that are of a kind."""
    linear = {name for name, module in block.parts().items() if isinstance(module, nn.Linear)}
    for slicing in proposals(block, copy):
        owners = {name.rpartition(".")[0] for name in slicing.cuts}
        alone = set(slicing.inputs) | set(slicing.outputs) <= linear and owners <= linear
        other = slicing.norms or slicing.divided or slicing.configs
        parts = any(" " in cut for cut in slicing.cuts.values())
        if kind != LINEARS or (alone and not other and not parts):
            yield slicing


def _first_proven(probe: Probe, candidates: Iterator[Slicing]) -> Slicing:
    """Raises Failure with the reason of the first that failed."""
    first: Failure | None = None
    forward: dict[str, bool] = {}
    for slicing in candidates:
        alike = repr(dataclasses.replace(slicing, inputs=()))  # inputs change gradients alone
        if forward.get(alike) is False:
            continue
        try:
            if alike not in forward:
                forward[alike] = False
                probe.forward(slicing)
                forward[alike] = True
            return probe.prove(slicing)
        except Failure as failure:
            first = first or failure
    raise first or Failure("no columns and rows were found")


def joined(*slicings: Slicing) -> Slicing:
    """The slicing of several blocks."""
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
        (),
    )


def share_of_products(model: Any, slicing: Slicing, *, layers: str) -> float:
    """The part of the matrix products of a token in the layers that is cut, of a model on meta."""
    text = model.config.get_text_config(decoder=True)
    experts, used = experts_of(text)

    def products(path: str, parameter: Any) -> float:  # noqa: ARG001 - the signature of a weight
        stacked = parameter.dim() == 3 and experts and parameter.shape[0] == experts
        return parameter.numel() * (used / experts if stacked else 1.0) * (parameter.dim() > 1)

    return _share(model, products, cut=lambda path, parameter: path in slicing.cuts, layers=layers)  # noqa: ARG005


def share_of_storage(model: Any, slicing: Slicing, *, layers: str, size: int) -> float:
    """The part of the layers' parameters of which a rank stores only its own, of a model on meta."""
    heads = heads_of(model.config)

    def stored(path: str, parameter: Any) -> bool:
        cut, shape = slicing.cuts.get(path), tuple(parameter.shape)
        return cut is not None and piece(cut, shape, heads=heads, rank=0, size=size).stored

    return _share(model, lambda path, parameter: parameter.numel(), cut=stored, layers=layers)  # noqa: ARG005


def _share(
    model: Any, weight: Callable[[str, Any], float], *, cut: Callable[[str, Any], bool], layers: str
) -> float:
    """The part of the weight of all parameters of the layers that those with a `cut` have."""
    total = part = 0.0
    for name, parameter in model.named_parameters():
        if name.startswith(f"{layers}."):
            path = name.removeprefix(f"{layers}.").partition(".")[2]
            total += weight(path, parameter)
            part += weight(path, parameter) * cut(path, parameter)
    return part / total if total else 0.0
