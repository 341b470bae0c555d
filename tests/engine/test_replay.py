"""A step that is repeated to find non-finite numbers computes the same, and leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybridtrain.checkpoint.fragments import Fragment
from hybridtrain.parallel.grad_norm import local_part
from hybridtrain.precision.provenance import Recorder
from tests import cases
from tests.cases import Case
from tests.ranks import run_ranks


def replayed(case: Case) -> None:
    """Replays step 1 before it is done; its result and the state are those of a run without."""
    engine = cases.start(case)

    def batches(step: int) -> list[Any]:
        return case.batches(step, dp_rank=engine.mesh.dp_rank, dp=engine.layout.dp)

    def state() -> dict[str, torch.Tensor]:
        parts = engine.state().items()
        local = {
            key: value.values if isinstance(value, Fragment) else local_part(value) for key, value in parts
        }
        return {key: value.detach().clone() for key, value in local.items()}

    scale = engine.train_step(batches(0), lr=case.lr).loss_scale
    before = state()
    recorder = Recorder([tuple(batch.input_ids_BT.shape) for batch in batches(1)])
    replay = engine.replay(batches(1), loss_scale=scale * 2, watcher=recorder)
    assert recorder.sign() is None
    after = state()
    assert after.keys() == before.keys()
    assert [key for key, value in after.items() if not torch.equal(before[key], value)] == []
    again = engine.train_step(batches(1), lr=case.lr)
    assert torch.equal(again.loss, replay.loss)
    assert float(again.grad_norm) == pytest.approx(
        float(replay.grad_norm), rel=1e-3 if case.precision == "fp16_mixed" else 0
    )
    if case.precision == "fp16_mixed":
        assert float(replay.loss_scale) == 2 * float(again.loss_scale)


TORCH = [
    pytest.param(Case("single")),
    *(
        pytest.param(Case(layout, precision=precision), marks=pytest.mark.slow)
        for layout, precision in (
            ("pp2-dp_shard2", "fp32"),
            ("pp2", "fp32"),
            ("single", "fp16_mixed"),
            ("tp2", "fp16_mixed"),
            ("dp_shard2-zero3", "bf16_mixed"),
            ("pp2-zbv_zero_bubble", "fp32"),
        )
    ),
]
DEEPSPEED = [
    pytest.param(cases.deepspeed(layout, precision=precision), marks=pytest.mark.slow)
    for layout, precision in (
        ("dp_shard2-zero1", "fp32"),
        ("dp_shard2-zero3", "bf16_mixed"),
        ("dp_shard2-zero1", "fp16_mixed"),
        ("pp2-tp2", "bf16_mixed"),
    )
]


@pytest.mark.parametrize("case", [*TORCH, *DEEPSPEED])
def test_a_replay_leaves_no_trace(case: Case) -> None:
    run_ranks(case.world_size, replayed, case)
