"""Which layers a pipeline stage holds: the lightest cut, counted in FLOPs, and what is given instead."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import pytest

from hybridtrain.analysis.facts import facts
from hybridtrain.config.schema import Config, ParallelConfig
from hybridtrain.errors import UserError
from hybridtrain.plan import notation, schedules, stages
from hybridtrain.plan.batch import BatchPlan
from hybridtrain.types import ModelFacts
from tests.cases import model
from tests.plan.test_layout import check


def cut(found: ModelFacts, layout: str, *, recompute: str = "none", seq_len: int = 64) -> stages.Cut:
    """With 8 micro-batches."""
    config, parallel = Config(), ParallelConfig(**notation.parse(layout))
    config.recompute.kind = recompute
    plan = BatchPlan(1, seq_len, 8, 8)
    return stages.cut(config, parallel=parallel, pp=parallel.pp, plan=plan, facts=found)


def sizes(found: ModelFacts, layout: str, **options: Any) -> list[int]:
    return [len(part) for part in cut(found, layout, **options).layers]


def dense(layers: int, *, head: float) -> ModelFacts:
    """Equal layers, and a head that takes `head` times as much as one."""
    fields = model(num_hidden_layers=layers, vocab_size=8)
    layer = sum(facts(fields).parameters_of_layers) / layers + 2 * 64 * 65 / 2  # with attention
    return facts(model(num_hidden_layers=layers, vocab_size=round(head * layer / 64)))


@pytest.mark.parametrize(
    ("layers", "head", "layout", "expected"),
    [
        (8, 0.3, "pp4", [2, 2, 2, 2]),
        (5, 0.3, "pp2", [3, 2]),
        (7, 0.3, "pp4", [2, 2, 2, 1]),
        (9, 0.3, "pp4", [2, 3, 2, 2]),  # the embedding counts a little
        (3, 0.3, "pp3", [1, 1, 1]),
        (3, 5.0, "pp3", [1, 1, 1]),
        (8, 1.3, "pp2", [5, 3]),  # 5 and 4.3, not 4 and 5.3
        (8, 2.3, "pp4", [2, 3, 2, 1]),
        (32, 6.0, "pp4", [9, 10, 9, 4]),
        (9, 3.0, "pp2-interleaved_1f1b", [3, 2, 3, 1]),  # 3 + 3 and 2 + 4
        (9, 3.0, "pp2-zbv_zero_bubble", [2, 3, 3, 1]),  # 2 + 4 and 3 + 3
    ],
)
def test_the_heaviest_rank_is_as_light_as_whole_layers_allow(layers, head, layout, expected):
    found = cut(dense(layers, head=head), layout)
    assert [len(part) for part in found.layers] == expected
    assert [layer for part in found.layers for layer in part] == list(range(layers))


def test_layers_that_are_recomputed_weigh_more_against_the_head():
    heavy = dense(12, head=3.2)
    assert sizes(heavy, "pp2") == [8, 4]  # 8 and 7.2
    assert sizes(heavy, "pp2", recompute="full") == [7, 5]  # 7 and 5 + 2.4


def test_attention_to_more_positions_weighs_more_against_the_head():
    assert sizes(dense(12, head=3.2), "pp2", seq_len=4096) == [6, 6]


def test_experts_weigh_what_a_token_uses_of_them():
    """Two dense layers of 30 before six of 100, of which a token uses 10."""
    parameters, inactive = (3 << 20,) * 2 + (10 << 20,) * 6, (0,) * 2 + (9 << 20,) * 6
    even = dense(8, head=0.01)
    sparse = dataclasses.replace(even, layer_parameters=parameters, layer_inactive=inactive)
    assert sizes(sparse, "pp2") == [2, 6]
    assert sizes(dataclasses.replace(sparse, layer_inactive=()), "pp2") == [5, 3]


def least(work: tuple[int, ...], ranks: tuple[tuple[int, ...], ...], micro_batches: int) -> int:
    """The time of the best of all cuts."""
    layers, count = len(work), sum(map(len, ranks))
    found = []
    for inner in itertools.combinations(range(1, layers), count - 1):
        bounds = (0, *inner, layers)
        loads = [sum(work[start:stop]) for start, stop in itertools.pairwise(bounds)]
        of_ranks = [sum(loads[index] for index in numbers) for numbers in ranks]
        found.append(micro_batches * max(of_ranks) + (len(ranks) - 1) * max(loads))
    return min(found)


@pytest.mark.parametrize(
    ("schedule", "pp", "virtual", "layers", "within"),
    [
        ("1f1b", 2, 1, 14, 1.0),
        ("1f1b", 4, 1, 14, 1.0),
        ("1f1b", 5, 1, 12, 1.0),
        ("interleaved_1f1b", 2, 2, 14, 1.0),
        ("interleaved_1f1b", 3, 2, 12, 1.0),
        ("zbv_zero_bubble", 3, 2, 12, 1.0),
        ("interleaved_1f1b", 2, 3, 19, 1.03),  # too many cuts to try each one
    ],
)
def test_no_other_cut_takes_less_time(schedule, pp, virtual, layers, within):
    chance = random.Random(f"{schedule} {pp} {virtual}")
    numbers = (schedules.stage_ids(rank, pp=pp, per_rank=virtual, schedule=schedule) for rank in range(pp))
    ranks = tuple(map(tuple, numbers))
    for head in (0, 150, 370):
        work = [chance.randint(50, 200) for _ in range(layers)]
        work[-1] += head
        bounds = stages._best(tuple(work), ranks, 2 * pp)
        loads = tuple(sum(work[start:stop]) for start, stop in itertools.pairwise(bounds))
        parts = tuple(range(start, stop) for start, stop in itertools.pairwise(bounds))
        assert stages.Cut(parts, loads, ranks).step(2 * pp) <= within * least(tuple(work), ranks, 2 * pp)


def test_what_several_stages_a_rank_would_save():
    """8 equal layers on 2 ranks, 4 micro-batches: 5 x 4 layers, or 4 x 4 and then a stage of 2 or of 1."""
    config, plan = Config(), BatchPlan(1, 64, 4, 4)
    config.parallel.pp, even = 2, dense(8, head=0.01)
    number, saved = stages.virtual(config, pp=2, plan=plan, facts=even)
    assert (number, saved) == (4, pytest.approx(1 - 17 / 20, abs=0.01))
    assert stages.virtual(config, pp=2, plan=BatchPlan(1, 64, 5, 5), facts=even) == (1, 0.0)
    config.parallel.schedule = "zbv_zero_bubble"
    assert stages.virtual(config, pp=2, plan=plan, facts=even) == (1, 0.0)


def test_a_cut_that_is_given_is_used():
    found = cut(dense(8, head=0.1), "pp3-cut2.7")
    assert found.layers == (range(2), range(2, 7), range(7, 8))
    assert found.imbalance == pytest.approx(5 * 3 / 8.1 - 1, abs=0.01)


@pytest.mark.parametrize(
    ("layout", "given", "words"),
    [
        ({"pp": 2}, [3, 5], "it names 2 layers, but after layer 0 2 stages begin at 1\n"),
        ({"pp": 4}, [2, 4], "4 stages begin at 3\n  allowed: 3 ascending, from 1 to 7"),
        ({"pp": 2, "schedule": "interleaved_1f1b"}, [4], "4 stages begin at 3"),
        ({"pp": 1}, [4], "with pp=1 there is one stage\n  allowed: []"),
        ({"pp": 3}, [5, 2], "not in ascending order"),
        ({"pp": 3}, [4, 4], "one is empty"),
        ({"pp": 3}, [0, 4], "the first stage, which begins at layer 0, would be empty"),
        ({"pp": 3}, [4, 8], "the model has 8 layers, 0 to 7"),
    ],
)
def test_a_cut_that_does_not_fit_is_refused(layout, given, words):
    with pytest.raises(UserError) as error:
        check(ParallelConfig(**layout, cut=given), world_size=layout["pp"])
    assert str(error.value).startswith(f"parallel.cut={given}: ")
    assert words in str(error.value)


def test_a_cut_that_fits_is_accepted():
    check(ParallelConfig(pp=3, cut=[1, 7]), world_size=3)
    check(ParallelConfig(pp=2, schedule="zbv_zero_bubble", cut=[1, 3, 5]), world_size=2)
