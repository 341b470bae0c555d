"""The pipeline schedules' own rules: what rules.check accepts torch can build, and what
torch refuses we refuse.

Each schedule is built by torch itself for every number of ranks, stages and micro-batches below, on
torch's fake process group.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.testing._internal.distributed.fake_pg import FakeStore

from hybridtrain.config.schema import BatchConfig, ParallelConfig
from hybridtrain.errors import UserError
from hybridtrain.parallel.pipeline import _SCHEDULES
from hybridtrain.plan import layout, rules, schedules
from hybridtrain.plan.batch import plan_batch
from hybridtrain.plan.capabilities import of_engine
from tests.plan import test_layout

FACTS = dataclasses.replace(test_layout.FACTS, layers=16)
MICRO_BATCHES = range(1, 13)
# Where we are stricter than torch, and why: with fewer micro-batches than ranks some only wait, and
# interleaved # schedules are defined for whole rounds.
STRICTER = {
    "gpipe": lambda n, pp: n < pp,
    "looped_bfs": lambda n, pp: n < pp,
    "zbv_zero_bubble": lambda n, pp: n < pp,
    "interleaved_1f1b": lambda n, pp: n % pp != 0,
    "interleaved_zero_bubble": lambda n, pp: n % pp != 0,
}
CASES = [
    (schedule, pp, virtual)
    for schedule, pp, virtual in itertools.product(schedules.SCHEDULES, (2, 4), (1, 2, 3, 4))
    if (virtual == 1) == (schedule in schedules.SINGLE) and (virtual == 2 or schedule not in schedules.V)
]


@pytest.fixture(params=[2, 4])
def fake_ranks(request: pytest.FixtureRequest) -> Iterator[int]:
    dist.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


def accepts(parallel: ParallelConfig, *, micro_batches: int) -> bool:
    """Whether rules.check lets this number of micro-batches through."""
    resolved = layout.resolve(parallel, world_size=parallel.pp)
    plan = plan_batch(
        BatchConfig(global_batch_size=micro_batches, micro_batch_size=1), layout=resolved, seq_len=64
    )
    try:
        rules.check(
            parallel,
            layout=resolved,
            plan=plan,
            precision="fp32",
            facts=FACTS,
            capabilities=of_engine("torch"),
        )
    except UserError as error:
        if not str(error).startswith("batch.global_batch_size="):
            raise
        return False
    return True


def theirs(schedule: str, *, pp: int, virtual: int, micro_batches: int) -> bool:
    """Whether torch builds it.

    Where a rank has several stages, building goes through every rank's actions and the messages between them.
    """
    stages = [
        PipelineStage(
            torch.nn.Identity(),
            index,
            pp * virtual,
            torch.device("cpu"),
            input_args=(torch.empty(1),),
            output_args=(torch.empty(1),),
        )
        for index in schedules.stage_ids(0, pp=pp, per_rank=virtual, schedule=schedule)
    ]
    try:
        _SCHEDULES[schedule](
            stages[0] if schedule in schedules.SINGLE else stages,
            n_microbatches=micro_batches,
            loss_fn=torch.sum,
        )
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
def test_we_accept_nothing_that_torch_refuses(fake_ranks: int, schedule: str) -> None:
    for _, pp, virtual in (case for case in CASES if case[:2] == (schedule, fake_ranks)):
        parallel = ParallelConfig(pp=pp, schedule=schedule, virtual_stages=virtual)
        accepted = {n for n in MICRO_BATCHES if accepts(parallel, micro_batches=n)}
        buildable = {n for n in MICRO_BATCHES if theirs(schedule, pp=pp, virtual=virtual, micro_batches=n)}
        assert accepted
        assert accepted <= buildable, (
            f"{schedule}, {virtual} stages on each of {pp} ranks: "
            f"torch refuses {sorted(accepted - buildable)}"
        )
        stricter = {n for n in buildable if schedule in STRICTER and STRICTER[schedule](n, pp)}
        assert accepted == buildable - stricter, (
            f"{schedule}, {virtual} stages on each of {pp} ranks: "
            f"torch builds {sorted(buildable - accepted)} too"
        )


@pytest.mark.parametrize("schedule", schedules.V)
def test_v_schedules_want_two_stages_per_rank(schedule: str) -> None:
    parallel = ParallelConfig(pp=2, schedule=schedule, virtual_stages=3)
    with pytest.raises(UserError, match=r"parallel\.virtual_stages=3: .* exactly two stages per rank"):
        accepts(parallel, micro_batches=12)
