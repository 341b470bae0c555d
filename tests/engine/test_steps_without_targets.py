"""A step whose global batch has no token that carries loss: no loss, no update, and nothing else changes
either. On both engines."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from hybridtrain.checkpoint.fragments import Fragment
from hybridtrain.config.schema import PrecisionConfig
from hybridtrain.precision.loss_scale import LossScaler
from hybridtrain.types import IGNORE_INDEX
from tests.cases import Case, deepspeed, reference, start
from tests.ranks import run_ranks

SLOW = pytest.mark.slow
SCALING = (("precision.init_scale", 1024.0), ("precision.growth_interval", 2))


def local(tensor: Any) -> torch.Tensor:
    # a Fragment of DeepSpeed's flat memory
    tensor = tensor.values if isinstance(tensor, Fragment) else tensor
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach().clone()


def run_with_blanks(case: Case, blank: tuple[int, ...]) -> list[dict[str, Any]]:
    """What each step did; in the steps `blank` no label is left."""
    engine = start(case)
    found = []
    for number in range(case.steps):
        batches = case.batches(number, dp_rank=engine.mesh.dp_rank, dp=engine.layout.dp)
        if number in blank:
            batches = [
                dataclasses.replace(batch, labels_BT=torch.full_like(batch.labels_BT, IGNORE_INDEX))
                for batch in batches
            ]
        before = {key: local(value) for key, value in engine.state().items()}
        result = engine.train_step(batches, lr=case.lr)
        after = {key: local(value) for key, value in engine.state().items()}
        changed = sorted(key for key in before if not torch.equal(before[key], after[key]))
        row = {
            name: float(getattr(result, name))
            for name in ("loss", "grad_norm", "skipped", "empty", "loss_scale")
        }
        row["tokens"] = float(result.counts[0])
        found.append({**row, "changed": changed})
    return found


TORCH = [
    Case("single", steps=3),
    Case("dp_shard2-zero3", steps=3),
    Case("pp2", steps=3),
    Case("single", precision="bf16_pure", steps=3),
]
DEEPSPEED = [
    deepspeed("dp_shard2-zero1"),
    deepspeed("pp2"),
    deepspeed("dp_shard2-zero3"),
    deepspeed("dp_shard2-zero2"),
]


@pytest.mark.parametrize(
    "case",
    [
        *TORCH[:3],
        pytest.param(TORCH[3], marks=SLOW),
        *(dataclasses.replace(case, steps=3) for case in DEEPSPEED[:1]),
        *(pytest.param(dataclasses.replace(case, steps=3), marks=SLOW) for case in DEEPSPEED[1:]),
    ],
    ids=lambda case: f"{dict(case.overrides).get('engine.kind', 'torch')}-{case.layout}-{case.precision}",
)
def test_no_loss_and_no_update(case):
    for found in run_ranks(case.world_size, run_with_blanks, case, (1,)):
        first, empty, last = found
        assert math.isnan(empty["loss"])
        assert (empty["tokens"], empty["skipped"], empty["empty"], empty["changed"]) == (0, 0, 1, [])
        for step in (first, last):
            assert (step["skipped"], step["empty"]) == (0, 0)
            assert math.isfinite(step["loss"])
            assert step["changed"]


@pytest.mark.parametrize(
    "case", [Case("single", precision="fp16_mixed", steps=5, overrides=SCALING)], ids=["torch"]
)
def test_the_loss_scale_waits(case):
    """It grows after two finite steps: the empty one between them is neither finite nor not."""
    (found,) = run_ranks(1, run_with_blanks, case, (1,))
    assert [step["loss_scale"] for step in found] == [1024, 1024, 1024, 2048, 2048]
    assert [step["changed"] == [] for step in found] == [False, True, False, False, False]


@pytest.mark.slow
def test_the_loss_scale_waits_under_deepspeed():
    case = dataclasses.replace(deepspeed("single", precision="fp16_mixed", overrides=SCALING), steps=6)
    plain = dataclasses.replace(case, steps=5)
    (found,), (without,) = run_ranks(1, run_with_blanks, case, (2,)), run_ranks(1, run_with_blanks, plain, ())
    assert found[2]["changed"] == []
    assert [step["loss_scale"] for step in found if not step["empty"]] == [
        step["loss_scale"] for step in without
    ]


def test_the_scaler_is_as_it_was_after_an_empty_step():
    scaler = LossScaler(
        PrecisionConfig(kind="fp16_mixed", init_scale=4.0, growth_interval=2, hysteresis=1),
        device=torch.device("cpu"),
    )
    scales = []
    for nonfinite, empty in ((0, 0), (0, 1), (0, 1), (0, 0), (1, 0), (0, 1)):
        scaler.update(torch.tensor(float(nonfinite)), empty=torch.tensor(float(empty)))
        scales.append(float(scaler.scale))
    assert scales == [4.0, 4.0, 4.0, 8.0, 4.0, 4.0]


@pytest.mark.parametrize(
    "case",
    [
        Case("dp_replicate2", steps=2),
        pytest.param(dataclasses.replace(deepspeed("dp_shard2-zero1"), steps=2), marks=SLOW),
    ],
)
def test_one_rank_without_targets_is_no_reason_to_wait(case):
    """The other rank's rows alone decide, as they do in one process."""
    blanked = dataclasses.replace(case, blank_rows=(0, 1, 2, 3))
    theirs = reference(dataclasses.replace(blanked, layout="single", overrides=()))
    for found in run_ranks(2, run_with_blanks, blanked, ()):
        assert [step["empty"] for step in found] == [0, 0]
        assert [step["loss"] for step in found] == pytest.approx(theirs.losses, rel=1e-5)
        assert [step["grad_norm"] for step in found] == pytest.approx(theirs.grad_norms, rel=1e-5)
