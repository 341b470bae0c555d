"""A flag that one rank raises is seen by all after the same step, and leaves the token count as it is."""

import signal
from typing import Any

import pytest
import torch.distributed as dist

from hybridtrain.runtime.flags import Flags
from hybridtrain.runtime.stop import Stop
from hybridtrain.types import IGNORE_INDEX
from tests.cases import Case, deepspeed, start
from tests.ranks import run_ranks

CASES = {
    "single": Case(),
    **{
        layout: Case(layout)
        for layout in ("tp2", "pp2", "dp_replicate2", "dp_shard2-zero3", "pp2-dp_shard2-tp2")
    },
    **{f"deepspeed {layout}": deepspeed(layout) for layout in ("dp_shard2-zero2", "tp2-nosp", "pp2")},
}


def seen(case: Case) -> tuple[list[dict[str, int]], list[int]]:
    """What is read after each of four steps, and their tokens.

    The last rank raises `up` before the second and takes it out before the fourth.
    """
    engine: Any = start(case)
    engine.flags = Flags(("up", "all"))
    engine.flags.raised.add("all")
    found, tokens = [], []
    for number in range(4):
        if number == 1 and dist.get_rank() == case.world_size - 1:
            engine.flags.raised.add("up")
        if number == 3:
            engine.flags.forget("up")
        batches = case.batches(number, dp_rank=engine.mesh.dp_rank, dp=engine.layout.dp)
        tokens.append(int(engine.train_step(batches, lr=case.lr).counts[0]))
        engine.eval_step(batches)  # between two steps: carries no flags
        found.append(dict(engine.flags.read()))
    return found, tokens


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_see_a_flag_after_the_step_that_counts_it(name):
    case = CASES[name]
    expected = [{"up": up, "all": case.world_size} for up in (0, 1, 1, 0)]
    tokens = [int((case.rows(step)[1] != IGNORE_INDEX).sum()) for step in range(4)]
    assert run_ranks(case.world_size, seen, case) == [(expected, tokens)] * case.world_size


@pytest.mark.parametrize(
    ("counts", "status", "reason"),
    [
        ({"SIGINT": 2}, "interrupted", "stopped by Ctrl-C (SIGINT received)"),
        ({"SIGINT": 1, "SIGTERM": 1, "SIGUSR1": 3}, "interrupted", "SIGTERM received"),
        ({"SIGUSR1": 1, "SIGTERM": 0}, "preempted", "SIGUSR1 received"),
        ({"SIGUSR1": 1, "deadline": 1}, "preempted", "the job's time is nearly up"),
    ],
)
def test_of_several_reasons_to_stop_every_rank_names_the_same(counts, status, reason, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    stop = Stop(["USR1", "TERM", "INT"], before_s=0)
    assert not stop.agree(dict.fromkeys(stop.flags, 0))
    assert (stop.status, stop.reason) == ("", "")
    assert stop.agree({**dict.fromkeys(stop.flags, 0), **counts})
    assert (stop.status, stop.reason) == (status, reason)
    assert stop.reason_here() is None
    stop.deadline = 0.0
    assert stop.reason_here() == "deadline"
    stop._signal = signal.SIGTERM
    assert stop.reason_here() == "SIGTERM"
