"""Checkpoints of the DeepSpeed engine: bit for bit under the same layout, the same state under another one
and in the other engine."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hybridtrain.types import Progress
from tests.cases import Case, deepspeed, model, start, whole
from tests.ranks import run_ranks

PROGRESS = Progress(step=2, tokens_seen=256, fingerprints={})


def step(engine: Any, case: Case, number: int) -> float:
    return float(
        engine.train_step(
            case.batches(number, dp_rank=engine.mesh.dp_rank, dp=engine.layout.dp), lr=case.lr
        ).loss
    )


def weights(engine: Any) -> dict[str, torch.Tensor]:
    return {name: whole(weight).clone() for name, weight in engine.weights()}


def save_and_go_on(case: Case, path: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Two steps, a checkpoint, two more steps: the weights in the checkpoint and the later losses."""
    engine = start(case)
    for number in range(2):
        step(engine, case, number)
    saved = weights(engine)
    engine.save(path, PROGRESS).result()
    return saved, [step(engine, case, number) for number in (2, 3)]


def load_and_go_on(case: Case, path: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    engine = start(case)
    step(engine, case, 9)  # somewhere else first: everything must come from the checkpoint
    assert engine.load(path) == PROGRESS
    return weights(engine), [step(engine, case, number) for number in (2, 3)]


def both(saved: Case, loaded: Case, path: Path) -> tuple[list[float], list[float]]:
    """Losses after the checkpoint, uninterrupted and resumed; the weights are compared here."""
    before = run_ranks(saved.world_size, save_and_go_on, saved, path)
    after = run_ranks(loaded.world_size, load_and_go_on, loaded, path)
    was, now = (
        {name: weight for found, _ in ranks for name, weight in found.items()} for ranks in (before, after)
    )
    assert was.keys() == now.keys()
    assert [name for name in was if not torch.equal(was[name], now[name])] == []
    return before[0][1], after[0][1]


@pytest.mark.parametrize(
    "layout",
    [
        "dp_shard2-zero1",
        pytest.param("dp_shard2-zero2", marks=pytest.mark.slow),
        pytest.param("dp_shard2-zero3", marks=pytest.mark.slow),
        pytest.param("dp_shard2-tp2-zero3-nosp", marks=pytest.mark.slow),
        pytest.param("pp2-tp2-nosp", marks=pytest.mark.slow),
    ],
)
def test_the_same_layout_continues_bit_for_bit(layout, tmp_path):
    case = deepspeed(layout, model("qwen3", tie_word_embeddings=True))
    losses, resumed = both(case, case, tmp_path / "checkpoint")
    assert resumed == losses


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("dp_shard2-zero1", "dp_shard2-zero3"),
        pytest.param("dp_shard2-zero3", "pp2-tp2-nosp", marks=pytest.mark.slow),
        pytest.param("pp2-tp2-nosp", "dp_shard2-zero2", marks=pytest.mark.slow),
        pytest.param("dp_shard4-zero2", "tp2-nosp", marks=pytest.mark.slow),
        pytest.param("dp_shard2-tp2-zero3-nosp", "single", marks=pytest.mark.slow),
        pytest.param("single", "pp2-dp_shard2-tp2-zero1-nosp", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_another_layout_has_the_same_state(before, after, tied, tmp_path):
    fields = model(vocab_size=257, tie_word_embeddings=tied)
    losses, resumed = both(deepspeed(before, fields), deepspeed(after, fields), tmp_path / "checkpoint")
    assert resumed == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (deepspeed("pp2-tp2-nosp"), Case("dp_shard2-zero3")),
        (Case("pp2-tp2"), deepspeed("dp_shard2-zero3")),
        (
            deepspeed("dp_shard2-zero1", precision="bf16_mixed"),
            Case("dp_shard2-zero3", precision="bf16_mixed"),
        ),
        pytest.param(
            Case("dp_shard2-zero2", precision="bf16_mixed"),
            deepspeed("dp_shard2-zero2", precision="bf16_mixed"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda case: f"{dict(case.overrides).get('engine.kind', 'torch')}-{case.layout}-{case.precision}",
)
def test_a_run_moves_between_engines_with_its_optimizer_state(before, after, tmp_path):
    losses, resumed = both(before, after, tmp_path / "checkpoint")
    assert resumed == pytest.approx(losses, rel=1e-5 if before.precision == "fp32" else 1e-3)
