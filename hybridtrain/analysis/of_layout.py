"""What tensor parallelism of a layout does to a model: ModelFacts with what is cut, and refusals."""

from __future__ import annotations

from dataclasses import replace

from hybridtrain.analysis.facts import BY_FIELDS
from hybridtrain.config.schema import ModelConfig, ParallelConfig
from hybridtrain.models.source import read_config
from hybridtrain.types import ModelFacts

LEAST = 0.5
"""Part of the layers' matrix products that tensor parallelism cuts at least: with less, most of the work is
done on every rank."""


def facts_of_layout(
    facts: ModelFacts, model: ModelConfig, parallel: ParallelConfig, *, tp: int, engine: str
) -> ModelFacts:
    """`facts`, with what `tp` tensor-parallel ranks cut of the model. Loads torch for a model type whose
    config.json does not tell (facts.py).
    """
    if tp == 1 or facts.model_type in BY_FIELDS:
        return facts
    from hybridtrain.analysis import slices
    from hybridtrain.models.build import hf_config

    config = hf_config(read_config(model), chosen=model.config, attention=model.attention)
    kind = slices.WITHOUT_SEQUENCE if parallel.sequence_parallel == "false" else slices.WITH_SEQUENCE
    if engine == "deepspeed":
        kind = slices.LINEARS
    found = slices.slicing_of(config, size=tp, kind=kind)
    refused = dict(facts.refused)
    if found.share < LEAST and not parallel.allow_replicated:
        why = "; ".join(f"{name}: {reason}" for name, reason in found.whole.items() if name != "sequence")
        refused["tp"] = f"{found.share:.0%} of its layers' matrix products would be cut ({why or 'no more'})"
    return replace(
        facts,
        refused=refused,
        sliced=found.share,
        stored=found.stored,
        sequence=bool(found.slicing.sequence),
        whole=found.whole,
    )
