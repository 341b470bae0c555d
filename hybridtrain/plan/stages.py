"""Which layers each pipeline stage holds. No torch.

A step of m micro-batches takes about

    m x heaviest rank  +  (pp - 1) x heaviest stage

the work of the rank that computes most, and the filling and draining of the pipeline; with one stage a rank,
(m + pp - 1) x the heaviest stage. The cut minimizes this. Work is counted in FLOPs: layers may differ, the
last stage also has the head, the first one the embedding.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from hybridtrain.plan import flops
from hybridtrain.plan.schedules import SINGLE, micro_batches, stage_ids, stages_per_rank

if TYPE_CHECKING:
    from hybridtrain.config.schema import Config, ParallelConfig
    from hybridtrain.plan.batch import BatchPlan
    from hybridtrain.types import ModelFacts

Bounds = tuple[int, ...]
"""The layers at which stages begin, and the number of layers."""
_EMBEDDING = 32
"""The embedding's look-up and its gradient take 1 to 5 % of the time of the head's matrix products (measured
on a CPU, with micro-batches of 2048 and of 512 tokens)."""
_MOST_CUTS = 5000
"""Up to this number of possible cuts all are tried, which takes 30 ms."""
_MOST_PAIRS = 12
"""Stages up to which moves of two layers at a time are tried."""
_MOST_VIRTUAL = 4
"""Stages a rank up to which a gain is looked for."""


@dataclass(frozen=True)
class Cut:
    """The layers of every stage, and the work of every stage."""

    layers: tuple[range, ...]
    work: tuple[int, ...]
    """FLOPs per token."""
    ranks: tuple[tuple[int, ...], ...]
    """Numbers of the stages of each pipeline rank."""

    @property
    def of_ranks(self) -> list[int]:
        """FLOPs per token of each pipeline rank."""
        return _of_ranks(self.work, self.ranks)

    @property
    def imbalance(self) -> float:
        """By how much the work of the heaviest rank is above the mean, as a share of the mean."""
        return max(self.of_ranks) * len(self.ranks) / sum(self.work) - 1

    def step(self, micro_batches: int) -> int:
        """Work during a step per token of a micro-batch: the time of a step, in FLOPs."""
        return _step(self.work, self.ranks, micro_batches)


def cut(config: Config, *, parallel: ParallelConfig, pp: int, plan: BatchPlan, facts: ModelFacts) -> Cut:
    """The cut at `parallel.cut`, or the best one, of `pp` pipeline ranks.

    `parallel` is used in place of the config's own.
    """
    per_rank = stages_per_rank(parallel) if pp > 1 else 1
    work = _work(facts, seq_len=plan.seq_len, recompute=config.recompute.kind)
    ranks = tuple(
        tuple(stage_ids(rank, pp=pp, per_rank=per_rank, schedule=parallel.schedule)) for rank in range(pp)
    )
    assert pp * per_rank <= facts.layers, "rules.check comes first"
    bounds = (0, *parallel.cut, facts.layers)
    if not parallel.cut:
        begins = (0, *(range(1, facts.layers) if facts.cuts is None else facts.cuts), facts.layers)
        units = tuple(sum(work[start:stop]) for start, stop in itertools.pairwise(begins))
        bounds = tuple(begins[index] for index in _best(units, ranks, plan.grad_accum))
    layers = tuple(range(start, stop) for start, stop in itertools.pairwise(bounds))
    return Cut(layers, tuple(sum(work[part.start : part.stop]) for part in layers), ranks)


def virtual(config: Config, *, pp: int, plan: BatchPlan, facts: ModelFacts) -> tuple[int, float]:
    """(stages a rank, share of a step's time that they save) of interleaved_1f1b, compared with a schedule of
    one stage a rank; (1, 0.0) if it saves nothing, cannot run, or there are several stages a rank already.

    That hidden states are sent more often is not counted.
    """
    parallel = config.parallel
    holds, _ = micro_batches("interleaved_1f1b", pp=pp, stages=pp)
    now = cut(config, parallel=parallel, pp=pp, plan=plan, facts=facts).step(plan.grad_accum)
    found = (1, 0.0)
    if parallel.schedule not in SINGLE or not holds(plan.grad_accum):
        return found
    for number in range(2, min(_MOST_VIRTUAL, facts.layers // pp) + 1):
        other = replace(parallel, schedule="interleaved_1f1b", virtual_stages=number, cut=[])
        step = cut(config, parallel=other, pp=pp, plan=plan, facts=facts).step(plan.grad_accum)
        found = max(found, (number, 1 - step / now), key=lambda pair: pair[1])
    return found


def _work(facts: ModelFacts, *, seq_len: int, recompute: str) -> tuple[int, ...]:
    """FLOPs per token of each layer; the embedding counts with the first one, the head with the last one."""
    again = 4 / 3 if recompute == "full" else 1  # the forward pass once more
    layers = [again * each for each in flops.of_layers(facts, seq_len=seq_len)]
    layers[0] += 6 * facts.vocab * facts.hidden / _EMBEDDING
    layers[-1] += flops.of_head(facts)
    return tuple(map(round, layers))  # whole numbers, whose sums do not depend on the order


@lru_cache
def _best(work: tuple[int, ...], ranks: tuple[tuple[int, ...], ...], micro_batches: int) -> Bounds:
    """Of the cuts that take the least time, the one whose stages and ranks differ least.

    With one stage a rank no cut takes less time. With several this holds while the cuts are few; else layers
    are moved between stages while this helps, which ends at most 3 % above the least time (compared with all
    cuts of 108 random models).
    """
    layers, stages, sums = len(work), sum(map(len, ranks)), [0, *itertools.accumulate(work)]

    def cost(bounds: Bounds) -> tuple[int, int]:
        loads = [sums[stop] - sums[start] for start, stop in itertools.pairwise(bounds)]
        uneven = sum(load * load for load in (*loads, *_of_ranks(loads, ranks)))
        return _step(loads, ranks, micro_batches), uneven

    begins = (even(layers, stages), _lightest(sums, stages))
    if len(ranks) == stages or math.comb(layers - 1, stages - 1) > _MOST_CUTS:
        return min((_improved(bounds, cost) for bounds in begins), key=cost)
    every = ((0, *inner, layers) for inner in itertools.combinations(range(1, layers), stages - 1))
    return min((*begins, *every), key=cost)


def _of_ranks(loads: Sequence[int], ranks: Sequence[Sequence[int]]) -> list[int]:
    return [sum(loads[index] for index in stages) for stages in ranks]


def _step(loads: Sequence[int], ranks: Sequence[Sequence[int]], micro_batches: int) -> int:
    """See the top of this file."""
    return micro_batches * max(_of_ranks(loads, ranks)) + (len(ranks) - 1) * max(loads)


def even(layers: int, stages: int) -> Bounds:
    """Bounds of stages that have as many layers; the first `layers % stages` have one more."""
    base, extra = divmod(layers, stages)
    return tuple(stage * base + min(stage, extra) for stage in range(stages + 1))


def _lightest(sums: Sequence[int], stages: int) -> Bounds:
    """Bounds of stages of which the heaviest is as light as possible.

    `sums`: the work of the first 0, 1, ... layers.
    """
    layers = len(sums) - 1

    def filled(limit: int) -> Bounds:
        """Each stage takes layers up to the limit, and leaves one for each stage after it."""
        bounds = [0]
        for after in reversed(range(stages)):
            fit = bisect_right(sums, sums[bounds[-1]] + limit) - 1
            bounds.append(min(fit, layers - after))
        return tuple(bounds)

    heaviest = max(stop - start for start, stop in itertools.pairwise(sums))
    limits = sorted(
        {
            sums[stop] - sums[start]
            for start in range(layers)
            for stop in range(start + 1, layers + 1)
            if sums[stop] - sums[start] >= heaviest
        }
    )
    return filled(limits[bisect_left(limits, True, key=lambda limit: filled(limit)[-1] == layers)])


def _improved(bounds: Bounds, cost: Callable[[Bounds], tuple[int, int]]) -> Bounds:
    """Move a layer from one stage to another, or two at a time, for as long as this helps."""
    pairs = len(bounds) - 1 <= _MOST_PAIRS
    while True:
        near = list(_neighbors(bounds))
        found = min(near, key=cost, default=bounds)
        if pairs and cost(found) >= cost(bounds):
            found = min((each for other in near for each in _neighbors(other)), key=cost, default=bounds)
        if cost(found) >= cost(bounds):
            return bounds
        bounds = found


def _neighbors(bounds: Bounds) -> Iterator[Bounds]:
    """Cuts with one layer less in a stage and one more in another: the bounds between them move by one."""
    stages = len(bounds) - 1
    for first, last, by in itertools.product(range(1, stages), range(1, stages), (-1, 1)):
        if first <= last:
            between = (bound + by for bound in bounds[first : last + 1])
            moved = (*bounds[:first], *between, *bounds[last + 1 :])
            if moved[first - 1] < moved[first] and moved[last] < moved[last + 1]:
                yield moved
