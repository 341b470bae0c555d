"""What the clock's readings come to: medians, intervals, figures by hand."""

import math
import random
import statistics

import pytest

from hybridtrain.analysis.facts import facts
from hybridtrain.bench import result, sampled
from hybridtrain.bench.result import StepWork, Timing
from hybridtrain.bench.sampled import Pair
from hybridtrain.config.compose import compose
from hybridtrain.plan import flops


@pytest.mark.parametrize(
    ("rounds", "k", "confidence"),
    [(6, 1, 0.96875), (9, 2, 0.9609), (15, 4, 0.9648), (20, 6, 0.9586), (5, 1, 0.9375), (1, 1, 0.0)],
)
def test_the_interval_is_the_sign_tests(rounds, k, confidence):
    """k and its confidence as printed in tables of the sign test."""
    ours = [1.0] * rounds
    theirs = [1.0 + number / 100 for number in range(rounds)]
    random.Random(0).shuffle(theirs)
    found = result.paired_ratio(ours, theirs)
    assert found.median == pytest.approx(statistics.median(theirs))
    assert (found.low, found.high) == pytest.approx((sorted(theirs)[k - 1], sorted(theirs)[-k]))
    assert found.confidence == pytest.approx(confidence, abs=1e-4)


def test_the_interval_holds_the_true_median_as_often_as_it_says():
    chance = random.Random(1)
    trials = 2000
    within = 0
    for _ in range(trials):
        found = result.paired_ratio([1.0] * 15, [math.exp(chance.gauss(0.2, 0.5)) for _ in range(15)])
        within += found.low <= math.exp(0.2) <= found.high
    assert within / trials == pytest.approx(0.9648, abs=0.015)


def timing(name: str, **changes) -> Timing:
    values = {
        "rounds": [[2.0, 4.0], [3.0, 3.0]],
        "data_s": [0.3, 0.3],
        "losses": [6.0, 5.0],
        "memory_gib": [1.0, 3.0],
        "memory_before_gib": [0.5, 0.5],
    }
    return Timing(name, **({"processes": 2, "threads": 1} | values | changes))


def test_figures_by_hand():
    told = result.document(
        [timing("a"), timing("b", rounds=[[6.0, 6.0], [3.0, 3.0]])],
        work=StepWork(600, 1e3, 1e6),
        precision="fp32",
        facts_of_run={},
    )
    ours = told["sides"]["a"]
    assert (ours["step_s"], ours["tokens_per_s"], ours["tokens_per_s_per_device"], ours["mfu"]) == (
        3.0,
        200.0,
        100.0,
        pytest.approx(0.1),
    )
    assert (
        ours["memory_gib_max"],
        ours["memory_gib_sum"],
        ours["memory_gib_before"],
        ours["data_share"],
    ) == (3.0, 4.0, 0.5, pytest.approx(0.05))
    assert told["ratio"]["median"] == pytest.approx(1.5)  # of 6/3 and 3/3
    lines = result.table([timing("a")], StepWork(600, 1e3, None)).splitlines()
    assert lines[1].split() == [
        "a",
        "3.0000",
        "(2.7500",
        "to",
        "3.2500)",
        "200",
        "100",
        "-",
        "3.00",
        "4.00",
        "0.50",
    ]


@pytest.mark.parametrize("theirs", [6.001, math.nan])
def test_other_losses_are_not_the_same_work(theirs):
    pair = [timing("a"), timing("b", losses=[theirs, 5.0])]
    assert not result.agreement(*pair, precision="fp32").holds
    assert "NOT THE SAME WORK" in result.summary_lines(pair, precision="fp32", corpus=False)[-1]
    assert result.agreement(timing("a"), timing("b"), precision="fp32").holds


def test_times_that_vary_are_told():
    quiet = timing("b", rounds=[[3.0, 3.1], [3.0, 3.1]])
    assert not result.noise_warning([quiet, quiet])
    [line] = result.noise_warning([quiet, timing("plain loop", rounds=[[0.8, 3.5], [0.8, 3.5]])])
    assert line.startswith(
        "THE MACHINE WAS NOT QUIET: half of the steps lie in plain loop 0.8000 to 3.5000 s;"
    )
    assert line in result.summary_lines(
        [quiet, timing("plain loop", rounds=[[0.8, 3.5], [0.8, 3.5]])], precision="fp32", corpus=False
    )


def test_flops_of_the_1_1b_llama_by_hand():
    """Matrix products of one token, forward: 2 FLOPs per weight; causal attention sees (2048 + 1) / 2
    positions; backward is twice forward."""
    config = compose("bench", ["model=llama_1_1b"])
    layer = 2048 * 2048 * 2 + 2048 * 256 * 2 + 3 * 2048 * 5632  # q and o, k and v, gate and up and down
    attention = 2 * 2 * 2048 * 2049 / 2  # scores and weighted values
    forward = 22 * (2 * layer + attention) + 2 * 2048 * 32000
    # ours counts the norms' weights too
    assert flops.flops_per_token(facts(config.model.config), seq_len=2048) == pytest.approx(
        3 * forward, rel=1e-4
    )


def test_what_a_sampled_step_costs():
    """The median of the pairs' ratios, by the slowest rank."""
    ranks = [
        [Pair(0.1, 0.12), Pair(0.1, 0.2), Pair(0.1, 0.16)],
        [Pair(0.1, 0.15), Pair(0.05, 0.1), Pair(0.1, 0.1)],
    ]
    pairs = sampled.slowest(ranks)
    assert [pair.sampled_s for pair in pairs] == [0.15, 0.2, 0.16]
    assert "takes 1.600 times as long (0.1600 s)" in sampled.line(pairs, every=50)
    assert "training is 1.20% slower (3 pairs)" in sampled.line(pairs, every=50)
