"""Replicas of parameters that differ end the run, and are named with their ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import hybridtrain as ht
from hybridtrain.config import checks, compose
from hybridtrain.errors import UserError
from hybridtrain.parallel.grad_norm import local_part
from hybridtrain.runtime import launch
from hybridtrain.training.callbacks import Callback, Run, StepInfo
from hybridtrain.training.replicas import _digest
from tests.ranks import run_ranks
from tests.runs import arguments, finished

EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
TIED = {"parallel__pp": 2, "model__config__tie_word_embeddings": True}
HYBRID = {"parallel__dp_shard": 2, "parallel__dp_replicate": 2, "parallel__zero_stage": 3}
CASES = {
    "replicas": (2, {}, EMBEDDING, 1),
    "tp2, a norm that is not cut": (2, {"parallel__tp": 2}, NORM, 1),
    "pp2, a tied head": (2, TIED, EMBEDDING, 1),
    "zero3 twice": (4, HYBRID, EMBEDDING, 3),
}


class Flip(Callback):
    """After step 3, the lowest bit of one element of a parameter changes on one rank."""

    def __init__(self, name: str, rank: int) -> None:
        self.name, self.rank = name, rank

    def on_every_step(self, run: Run, info: StepInfo) -> None:
        if info.step == 3 and dist.get_rank() == self.rank:
            part = local_part(dict(run.engine.weights())[self.name].detach())
            part.view(torch.int32).view(-1)[0] ^= 1


def fit(argv: list[str], *planted: Callback) -> str:
    """Train on this rank; returns the message of a UserError, or ""."""
    launch.RANK_0_FIRST_S = launch.AFTER_RANK_0_S = 0.2
    try:
        ht.Trainer(ht.compose(*argv), callbacks=list(planted)).fit()
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("case", CASES)
def test_a_bit_that_changes_on_one_rank_ends_the_run(data: Path, run_dir: Path, case: str) -> None:
    world, layout, name, rank = CASES[case]
    argv = arguments(
        run_dir, data, train__guard_every=2, checkpoint__every=4, batch__micro_batch_size=2, **layout
    )
    for said in run_ranks(world, fit, argv, Flip(name, rank)):
        assert f"train.guard_every=2: after step 4 replicas of {name} differ" in said
        others = "1" if world == 4 else "0"
        assert f"those of rank {rank} from those of rank {others}" in said or world == 2
    assert not list(run_dir.glob("checkpoints/*")), "what it cannot trust is not saved"


def test_replicas_that_are_equal_are_trained(data: Path, run_dir: Path) -> None:
    argv = arguments(run_dir, data, train__guard_every=1, train__steps=3, parallel__tp=2)
    assert run_ranks(2, fit, argv) == ["", ""]


def test_where_nothing_has_a_replica_it_is_said_once(data: Path, run_dir: Path) -> None:
    ended = finished(1, arguments(run_dir, data, train__guard_every=1, train__steps=2))
    assert (ended.out + ended.err).count("no part of a parameter has a replica") == 1


def test_any_changed_bit_changes_the_digest() -> None:
    part = torch.randn(3, 5).bfloat16()
    digests = {int(_digest(part))}
    for element in range(15):
        for bit in range(16):
            changed = part.clone()
            changed.view(torch.int16).view(-1)[element] ^= -(1 << 15) if bit == 15 else 1 << bit
            digests.add(int(_digest(changed)))
    assert len(digests) == 1 + 15 * 16
    swapped = part.flatten()[torch.arange(14, -1, -1)]
    assert int(_digest(swapped)) not in digests


def test_deepspeed_is_refused() -> None:
    pytest.importorskip("deepspeed")
    config = compose.compose("train", ["model=tiny", "engine=deepspeed", "train.guard_every=5"])
    with pytest.raises(UserError, match=r"train\.guard_every"):
        checks.check(config)
