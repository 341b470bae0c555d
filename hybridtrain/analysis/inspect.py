"""`hybridtrain inspect`: what a model is made of, and what can be done with it."""

from __future__ import annotations

import time
from typing import Any

from hybridtrain.analysis.facts import BY_FIELDS, facts_of, places
from hybridtrain.analysis.of_layout import LEAST
from hybridtrain.analysis.slices import WITH_SEQUENCE, slicing_of
from hybridtrain.config.schema import InspectRoot
from hybridtrain.models.structure import Structure, structure_of
from hybridtrain.plan.cuts import as_text
from hybridtrain.plan.rules import even_shares
from hybridtrain.types import ModelFacts

CAPABILITIES = {"pp": "pipeline parallelism", "documents": "packed documents"}


def run(config: InspectRoot) -> int:
    """Print the model of `config`. Raises UserError for one that cannot be trained."""
    from hybridtrain.models.build import attention_of, hf_config
    from hybridtrain.models.source import read_config

    began = time.monotonic()
    facts = facts_of(config.model)
    fields = read_config(config.model)
    built = hf_config(fields, chosen=config.model.config, attention=config.model.attention)
    structure = structure_of(built)
    wanted, used = config.model.attention, attention_of(built)
    attention = used if used == wanted else f"{used} (this architecture has no {wanted})"
    lines = [*_parts(built, structure, facts), ("attention", attention)]
    lines += [("dropout", places(facts.dropped))] if facts.dropped else []
    lines += _claims(facts)
    lines += _tensor(built, facts, tp=config.inspect.tp)
    lines.append(("took", f"{time.monotonic() - began:.1f} s"))
    width = max(len(name) for name, _ in lines) + 2
    print("\n".join(f"{name:<{width}}{value}" for name, value in lines))
    return 0


def _parts(config: Any, structure: Structure, facts: ModelFacts) -> list[tuple[str, str]]:
    tied = ", embedding and head are one matrix" if facts.tied else ""
    layers = f"{structure.layers}, {facts.layers}"
    kinds = getattr(config.get_text_config(decoder=True), "layer_types", None)
    if kinds:
        layers += ": " + ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    scaled = "z" if structure.scale == 1.0 else f"{structure.scale:g} z"
    logits = scaled if structure.cap is None else f"{structure.cap:g} tanh({scaled} / {structure.cap:g})"
    return [
        ("model", f"{facts.model_type}, {facts.parameters:,} parameters{tied}"),
        ("before the layers", ", ".join(path for path, _ in structure.before)),
        *([("on every stage", ", ".join(structure.shared))] if structure.shared else []),
        ("layers", layers),
        ("after the layers", ", ".join((*structure.after, structure.head))),
        ("logits", logits if logits == "z" else f"{logits}, z: what the head returns"),
    ]


def _claims(facts: ModelFacts) -> list[tuple[str, str]]:
    """What holds is trained as in one plain process; what does not is refused."""
    lines = [("data parallelism, ZeRO", "exact")]
    begins = "exact" if facts.cuts is None else f"exact, of stages that begin at layers {as_text(facts.cuts)}"
    for key, name in CAPABILITIES.items():
        exact = begins if key == "pp" else "exact"
        lines.append((name, f"refused: {facts.refused[key]}" if key in facts.refused else exact))
    return lines


def _tensor(config: Any, facts: ModelFacts, *, tp: int) -> list[tuple[str, str]]:
    """What tensor parallelism cuts, and what is computed on every rank."""
    if tp == 1:
        return []
    even = even_shares(facts, tp=tp)
    if facts.model_type in BY_FIELDS and not even.holds:
        return [("tensor parallelism", f"refused: {even.problem}; possible: {even.allowed}")]
    found = slicing_of(config, size=tp, kind=WITH_SEQUENCE)
    sequence = "exact" if found.slicing.sequence else f"refused: {found.whole.get('sequence')}"
    whole = [(name, why) for name, why in found.whole.items() if name != "sequence"]
    cut = f"{tp} ranks cut {found.share:.0%} of the layers' matrix products"
    few = f"refused: {cut}; parallel.allow_replicated=true does it all the same"
    return [
        ("tensor parallelism", f"exact, {cut}" if found.share >= LEAST else few),
        *(("  on every rank", f"{name}: {why}") for name, why in whole),
        ("  along the sequence", sequence),
    ]
