"""The batch of a step: its ramp, the warm-up of its length, and what is refused of both."""

from __future__ import annotations

import math

import pytest

from hybridtrain.config.schema import BatchConfig
from hybridtrain.errors import UserError
from hybridtrain.plan.batch import BatchPlan, Stairs, plan_batch
from hybridtrain.plan.layout import ParallelLayout


def planned(*, dp: int = 2, seq_len: int = 256, **batch: int) -> BatchPlan:
    layout = ParallelLayout(pp=1, dp_replicate=1, dp_shard=dp, cp=1, tp=1)
    return plan_batch(
        BatchConfig(**{"global_batch_size": 32, "micro_batch_size": 2, **batch}),
        layout=layout,
        seq_len=seq_len,
    )


def test_the_stairs_of_the_module_docstring() -> None:
    plan = planned(ramp_start=8, ramp_increment=8, ramp_steps=9, seq_len_start=64, seq_len_steps=6)
    assert [plan.rows_at(step) for step in range(11)] == [8, 8, 8, 16, 16, 16, 24, 24, 24, 32, 32]
    assert [plan.seq_len // plan.pieces_at(step) for step in range(8)] == [
        64,
        64,
        64,
        128,
        128,
        128,
        256,
        256,
    ]


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ((4, 8), 1),
        ((4, 8, 12, 16), 3),
        ((4, 8, 12, 16), 10),
        ((1, 2, 3, 4, 5), 7),
        ((6,), 0),
        ((2, 64), 1000),
    ],
)
def test_what_comes_before_a_step_is_the_sum_of_the_steps_before(values: tuple[int, ...], steps: int) -> None:
    stairs = Stairs(values, steps)
    each = [stairs.at(step) for step in range(steps + 5)]
    assert each == sorted(each)
    assert set(each) == set(values)
    assert [stairs.before(step) for step in range(steps + 5)] == [
        sum(each[:step]) for step in range(steps + 5)
    ]


@pytest.mark.parametrize("rows", [1, 8, 9, 24, 25, 144, 145, 176, 177, 1000])
def test_the_number_of_steps_sees_the_rows_and_one_less_does_not(rows: int) -> None:
    for plan in (planned(), planned(ramp_start=8, ramp_increment=8, ramp_steps=9)):
        steps = plan.steps_of(rows)
        assert plan.rows_before(steps) >= rows > plan.rows_before(steps - 1)
    assert planned().steps_of(rows) == math.ceil(rows / 32)


def test_without_growth_nothing_changes() -> None:
    plan = planned()
    assert plan == BatchPlan(2, 256, 8, 32)
    assert (plan.rows_at(7), plan.rows_before(7), plan.pieces_at(7)) == (32, 224, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ramp_increment": 4}, "batch.ramp_increment=4: batch.ramp_start=0: there is no ramp"),
        ({"ramp_steps": 4}, "batch.ramp_steps=4: batch.ramp_start=0: there is no ramp"),
        (
            {"ramp_start": 6, "ramp_increment": 4, "ramp_steps": 9},
            "batch.ramp_start=6: a ramp grows to batch.global_batch_size=32 in multiples of 4",
        ),
        ({"ramp_start": 32, "ramp_increment": 4, "ramp_steps": 9}, "batch.ramp_start=32: a ramp grows"),
        ({"ramp_start": 8, "ramp_steps": 9}, "batch.ramp_increment=0: 24 rows between"),
        ({"ramp_start": 8, "ramp_increment": 6, "ramp_steps": 9}, "batch.ramp_increment=6: 24 rows between"),
        (
            {"ramp_start": 8, "ramp_increment": 16, "ramp_steps": 9},
            "batch.ramp_increment=16: 24 rows between",
        ),
        (
            {"ramp_start": 8, "ramp_increment": 8, "ramp_steps": 2},
            "batch.ramp_steps=2: the batch grows 3 times",
        ),
        ({"seq_len_steps": 4}, "batch.seq_len_steps=4: batch.seq_len_start=0: rows stay whole"),
        (
            {"seq_len_start": 96, "seq_len_steps": 9},
            "batch.seq_len_start=96: lengths double from it to data.seq_len=256",
        ),
        ({"seq_len_start": 256, "seq_len_steps": 9}, "batch.seq_len_start=256: lengths double"),
        ({"seq_len_start": 128, "seq_len_steps": 9, "seq_len": 255}, "0: this data.seq_len cannot be halved"),
        ({"seq_len_start": 64, "seq_len_steps": 1}, "batch.seq_len_steps=1: the length doubles 2 times"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError) as refused:
        planned(**options)
    assert message in str(refused.value)
    assert "allowed" in str(refused.value)
