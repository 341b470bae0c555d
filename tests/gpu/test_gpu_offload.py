"""Offloading from an NVIDIA GPU to the host's memory: parity, memory, checkpoints.
Run: pytest -m gpu tests/gpu"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cases import Case, differences, model, on_ranks, start
from tests.engine.test_offload import PLACES
from tests.engine.test_state import load_and_go_on, save_and_go_on
from tests.gpu.test_gpu_engine import BACKEND, GPUS, assert_close, world
from tests.ranks import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="no NVIDIA GPU")]


def case(place: str, layout: str, precision: str, **options: Any) -> Case:
    if world(layout) > GPUS:
        pytest.skip(f"{layout} wants {world(layout)} GPUs, here are {GPUS}")
    overrides = (*PLACES.get(place, ()), ("optim.ema", 0.9))
    return Case(layout, precision=precision, steps=3, device="cuda", overrides=overrides, **options)


@pytest.mark.parametrize("precision", ["fp32", "bf16_mixed", "fp16_mixed", "bf16_pure"])
@pytest.mark.parametrize("layout", ["single", "dp_shard2-zero3"])
@pytest.mark.parametrize("place", PLACES)
def test_parity(place: str, layout: str, precision: str) -> None:
    """With one plain process on the CPU, and with the same on the GPU without offloading."""
    ours = case(place, layout, precision)
    assert_close(ours)
    found = differences(on_ranks(ours), on_ranks(case("", layout, precision)))
    assert found["loss_rel"] < (1e-6 if precision == "fp32" else 1e-3), found


def held(ours: Case) -> tuple[int, int]:
    """(bytes on the GPU between steps, the most in the second step)."""
    engine = start(ours)
    engine.train_step(ours.batches(0, dp_rank=0, dp=1), lr=ours.lr)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    engine.train_step(ours.batches(1, dp_rank=0, dp=1), lr=ours.lr)
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()


def test_the_gpu_holds_less() -> None:
    """Between steps: weights, two moments and an average, 16 bytes a weight; 4; nothing. At the peak, of
    parameters that are offloaded a few layers."""
    fields = model(num_hidden_layers=12, hidden_size=512, intermediate_size=2048)
    kept, peaks = {}, {}
    for place in ("", *PLACES):
        ours = case(place, "single", "bf16_mixed", fields=fields)
        ((kept[place], peaks[place]),) = run_ranks(1, held, ours, backend=BACKEND)
    assert kept["optimizer"] < 0.35 * kept[""]
    assert kept["all"] < 0.1 * kept[""]
    assert peaks["all"] < 0.5 * peaks["optimizer"] < 0.5 * peaks[""]


def test_a_checkpoint_goes_on_elsewhere(tmp_path: Path) -> None:
    saved = case("all", "single", "bf16_mixed")
    ((state, losses),) = run_ranks(1, save_and_go_on, saved, tmp_path / "checkpoint", backend=BACKEND)
    for place in ("", "optimizer"):
        loaded, path = case(place, "single", "bf16_mixed"), tmp_path / "checkpoint"
        ((restored, resumed),) = run_ranks(1, load_and_go_on, loaded, path, backend=BACKEND)
        assert [key for key in state if not torch.equal(state[key].cpu(), restored[key].cpu())] == []
        assert resumed == pytest.approx(losses, rel=1e-3)
