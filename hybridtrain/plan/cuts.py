"""Where a model can be cut into pipeline stages, and what can run them. No torch.

The analysis of a model (analysis/) finds what its layers take besides the hidden states of the layer before
them: results of modules that each stage then has (ModelFacts.shared), and results of other layers, between
which no stage may begin (ModelFacts.cuts).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from hybridtrain.plan.layout import ParallelLayout
from hybridtrain.plan.rules import Rule
from hybridtrain.plan.schedules import SCHEDULES, SPLIT_BACKWARD, stages_per_rank
from hybridtrain.types import Capabilities, ModelFacts

if TYPE_CHECKING:
    from hybridtrain.config.schema import ParallelConfig


def rules(
    parallel: ParallelConfig, *, layout: ParallelLayout, facts: ModelFacts, capabilities: Capabilities
) -> Iterator[Rule]:
    """The rules of a layout with pp > 1."""
    named = f"every stage of a {facts.model_type} model runs {', '.join(facts.shared)}"
    able = not facts.shared or capabilities.shared_modules
    problem, instead = f"{named}: engine={capabilities.engine} does not", "engine=torch, or parallel.pp=1"
    yield Rule("parallel.pp", layout.pp, able, problem, "1", instead)
    whole = [name for name in SCHEDULES if name not in SPLIT_BACKWARD]
    # torch's split backward pass goes through what layers share once for each of them
    holds = not facts.shared or parallel.schedule in whole
    problem, instead = f"{named}: its backward pass cannot be split", "parallel.schedule=1f1b"
    yield Rule("parallel.schedule", parallel.schedule, holds, problem, ", ".join(whole), instead)
    if facts.cuts is not None:
        yield from _at_cuts(parallel, facts.cuts, pp=layout.pp, facts=facts)


def _at_cuts(
    parallel: ParallelConfig, cuts: tuple[int, ...], *, pp: int, facts: ModelFacts
) -> Iterator[Rule]:
    """Stages begin at some of `cuts`."""
    per_rank = stages_per_rank(parallel)
    why = "elsewhere, layers use more of earlier ones than hidden states"
    only = f"stages of this {facts.model_type} model begin at layers {as_text(cuts)}: {why}"
    most = (len(cuts) + 1) // per_rank
    yield Rule("parallel.pp", pp, pp <= most, only, f"up to {most}", f"parallel.pp={most}")
    holds = set(parallel.cut) <= set(cuts)
    yield Rule("parallel.cut", parallel.cut, holds, only, as_text(cuts), "parallel.cut=[], which chooses")


def as_text(numbers: Iterable[int]) -> str:
    """Ascending numbers: 1-3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
