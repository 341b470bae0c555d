"""Save and load: bit-exact under the same layout, the same state bit for bit under another one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from hybridtrain.types import Progress
from tests.cases import Case, model, start
from tests.ranks import run_ranks

PROGRESS = Progress(step=2, tokens_seen=256, fingerprints={})


def step(engine: Any, case: Case, number: int) -> float:
    return float(
        engine.train_step(
            case.batches(number, dp_rank=engine.mesh.dp_rank, dp=engine.layout.dp), lr=case.lr
        ).loss
    )


def gathered(engine: Any) -> dict[str, torch.Tensor]:
    """The whole state, in its own dtypes, but for int16, which gloo does not gather: in int32."""
    state = {
        key: value.int() if value.dtype == torch.int16 else value for key, value in engine.state().items()
    }
    return {key: _whole(value, engine.device).clone() for key, value in state.items()}


def _whole(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Also of what is offloaded; the device gathers it."""
    if not isinstance(value, DTensor):
        return value
    mesh, placements, stride = value.device_mesh, value.placements, value.stride()
    if mesh.device_type != device.type:  # dp_shard=1: nothing to gather
        return value.to_local()
    part = value.to_local().to(device)
    return DTensor.from_local(part, mesh, placements, shape=value.shape, stride=stride).full_tensor()


def save_and_go_on(case: Case, path: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Two steps, a checkpoint, two more steps: the state in the checkpoint and the later losses."""
    engine = start(case)
    for number in range(2):
        step(engine, case, number)
    state = gathered(engine)
    engine.save(path, PROGRESS).result()
    return state, [step(engine, case, number) for number in (2, 3)]


def load_and_go_on(case: Case, path: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    engine = start(case)
    step(engine, case, 9)  # somewhere else first: everything must come from the checkpoint
    assert engine.load(path) == PROGRESS
    state = gathered(engine)
    return state, [step(engine, case, number) for number in (2, 3)]


def merged(
    ranks: list[tuple[dict[str, torch.Tensor], list[float]]],
) -> tuple[dict[str, torch.Tensor], list[float]]:
    assert all(losses == ranks[0][1] for _, losses in ranks)
    return {key: value for state, _ in ranks for key, value in state.items()}, ranks[0][1]


def both(saved: Case, loaded: Case, path: Path) -> tuple[list[float], list[float]]:
    """Losses after the checkpoint, uninterrupted and resumed; the states are compared here."""
    state, losses = merged(run_ranks(saved.world_size, save_and_go_on, saved, path))
    restored, resumed = merged(run_ranks(loaded.world_size, load_and_go_on, loaded, path))
    assert state.keys() == restored.keys()
    assert [key for key in state if not torch.equal(state[key], restored[key])] == []
    return losses, resumed


@pytest.mark.parametrize(
    "layout",
    [
        "tp2",
        "pp2-zbv_zero_bubble",
        "dp_shard2-zero3",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("single", "dp_shard2-zero1")),
        pytest.param("pp2-dp_shard2-tp2", marks=pytest.mark.slow),
    ],
)
def test_the_same_layout_continues_bit_for_bit(layout, tmp_path):
    losses, resumed = both(
        Case(layout, model("qwen3")), Case(layout, model("qwen3")), tmp_path / "checkpoint"
    )
    assert resumed == losses


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("single", "pp2-tp2"),
        ("pp2-tp2", "dp_shard2-zero3"),
        ("dp_shard2-zero3", "pp2-zbv_zero_bubble"),
        ("pp2-zbv_zero_bubble", "single"),
        ("pp2-cut1", "pp2-cut3"),
        pytest.param("pp2", "dp_shard2-tp2-zero3", marks=pytest.mark.slow),
    ],
)
def test_another_layout_has_the_same_state(before, after, tied, tmp_path):
    fields = model(vocab_size=257, tie_word_embeddings=tied)
    losses, resumed = both(Case(before, fields), Case(after, fields), tmp_path / "checkpoint")
    assert resumed[0] == pytest.approx(losses[0], rel=1e-6)
    assert resumed[1] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    "precision", ["fp16_mixed", pytest.param("bf16_mixed", marks=pytest.mark.slow), "bf16_pure"]
)
def test_masters_moments_and_the_loss_scale_are_restored(precision, tmp_path):
    # the checkpoint lies between two growths
    overrides = (("precision.init_scale", 512.0), ("precision.growth_interval", 3))
    saved, loaded = (
        Case(layout, precision=precision, overrides=overrides) for layout in ("pp2", "dp_shard2-zero2")
    )
    losses, resumed = both(saved, loaded, tmp_path / "checkpoint")
    assert resumed[0] == pytest.approx(losses[0], rel=1e-3)
    if precision == "fp16_mixed":
        same, again = both(saved, saved, tmp_path / "again")
        assert same == again


def test_frozen_parameters_are_saved_without_moments(tmp_path):
    freeze = ("model.embed_tokens.*", "model.layers.0.*")
    losses, resumed = both(
        Case("pp2", freeze=freeze), Case("dp_shard2-zero3", freeze=freeze), tmp_path / "checkpoint"
    )
    assert resumed[0] == pytest.approx(losses[0], rel=1e-6)
