"""Where a model can be cut into pipeline stages, and what can run them. No torch.

The analysis of a model (analysis/) finds what its layers take besides the hidden states of the layer before
them: results of modules that each stage then has (ModelFacts.shared), and results of other layers, between
which no stage may begin (ModelFacts.cuts).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from hybridtrain.plan.layout import ParallelLayout, stage_layers
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
        yield _at_cuts(facts.cuts, pp=layout.pp, per_rank=stages_per_rank(parallel), facts=facts)


def _at_cuts(cuts: tuple[int, ...], *, pp: int, per_rank: int, facts: ModelFacts) -> Rule:
    """Stages begin at `cuts`."""
    begins = _begins(facts.layers, pp * per_rank)
    wrong = [layer for layer in begins if layer not in cuts]
    problem = (
        f"its {pp * per_rank} stages begin at layers {as_text(begins)}; of this {facts.model_type} model "
        f"none can begin at {as_text(wrong)}: layers use more of earlier ones than hidden states"
    )
    fitting = [
        degree
        for degree in range(2, facts.layers // per_rank + 1)
        if set(_begins(facts.layers, degree * per_rank)) <= set(cuts)
    ]
    # the largest below, else the next above
    degree = max(fitting, key=lambda each: (each <= pp, each if each <= pp else -each), default=1)
    allowed = f"stages that begin at layers {as_text(cuts)}"
    return Rule("parallel.pp", pp, not wrong, problem, allowed, f"parallel.pp={degree}")


def _begins(layers: int, stages: int) -> list[int]:
    """First layers of all stages but the first."""
    return [stage.start for stage in stage_layers(layers, stages)[1:]]


def as_text(numbers: Iterable[int]) -> str:
    """Ascending numbers: 1-3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
