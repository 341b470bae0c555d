"""One GPU: a step that never waits for the device, what recomputation saves when compiled, packed
rows, saving and going on.

Run: pytest -m gpu tests/gpu. With REHEARSE=1 they run on the CPU, without what only a GPU can show.
"""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from hybridtrain import engine as engines
from hybridtrain.plan import layout as layouts
from hybridtrain.plan.batch import plan_batch
from hybridtrain.runtime.flags import Flags
from hybridtrain.types import Batch, Progress
from tests.cases import Case, model, start
from tests.ranks import run_ranks

GPU = torch.cuda.device_count() > 0  # asks the driver without initialising CUDA here
REHEARSE = os.environ.get("REHEARSE") == "1"
DEVICE, BACKEND = ("cuda", "cpu:gloo,cuda:nccl") if GPU else ("cpu", "gloo")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not (GPU or REHEARSE), reason="no NVIDIA GPU")]
COMPILED = (("engine.compile", True),)


def on_device(case: Case, number: int) -> list[Batch]:
    return [batch.to(torch.device(case.device)) for batch in case.batches(number, dp_rank=0, dp=1)]


def step_under_watch(case: Case) -> tuple[float, float]:
    """(loss, norm) of a step during which a call that makes the host wait for the GPU is an error."""
    engine = start(case)
    engine.flags = Flags(("up",))
    engine.flags.raised.add("up")
    for number in range(2):
        engine.train_step(on_device(case, number), lr=case.lr)
    batches = on_device(case, 2)
    if case.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        result = engine.train_step(batches, lr=case.lr)
    finally:
        if case.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert engine.flags.read() == {"up": 1}
    return float(result.loss), float(result.grad_norm)


@pytest.mark.parametrize(
    ("precision", "compute"),
    [
        ("fp32", ""),
        ("fp64", ""),
        ("bf16_mixed", ""),
        ("fp16_mixed", ""),
        ("bf16_pure", ""),
        ("bf16_mixed", "fp8_tensorwise"),
        ("bf16_mixed", "fp8_rowwise"),
        ("fp32", "bf16"),
    ],
)
def test_a_step_never_waits_for_the_device(precision, compute):
    overrides = (("precision.init_scale", 1024.0), ("precision.compute", compute))
    case = Case(precision=precision, device=DEVICE, overrides=overrides)
    (found,) = run_ranks(1, step_under_watch, case, backend=BACKEND)
    assert 4.0 < found[0] < 8.0
    assert 0.0 < found[1] < 100.0


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_a_compiled_step_never_waits_for_the_device(kind):
    case = Case(precision="bf16_mixed", device=DEVICE, overrides=(*COMPILED, ("recompute.kind", kind)))
    (found,) = run_ranks(1, step_under_watch, case, backend=BACKEND)
    assert 4.0 < found[0] < 8.0


def peak_and_loss(case: Case) -> tuple[int, float]:
    """Bytes above what weights and optimizer state take, at the peak of a step after
    compilation; and its loss."""
    engine = start(case)
    for number in range(2):
        engine.train_step(on_device(case, number), lr=case.lr)
    batches = on_device(case, 2)
    if case.device != "cuda":
        return 0, float(engine.train_step(batches, lr=case.lr).loss)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = float(engine.train_step(batches, lr=case.lr).loss)
    return torch.cuda.max_memory_allocated() - before, loss


def test_selective_recomputation_saves_memory_when_compiled():
    large = (
        {
            "num_hidden_layers": 8,
            "hidden_size": 256,
            "intermediate_size": 1024,
            "max_position_embeddings": 1024,
        }
        if GPU
        else {"num_hidden_layers": 2}
    )
    rows = 1024 if GPU else 16
    found = {}
    for kind in ("none", "selective", "full"):
        overrides = (*COMPILED, ("recompute.kind", kind))
        case = Case(
            fields=model(**large),
            precision="bf16_mixed",
            seq_len=rows,
            global_batch_size=4,
            micro_batch_size=4,
            device=DEVICE,
            overrides=overrides,
        )
        (found[kind],) = run_ranks(1, peak_and_loss, case, backend=BACKEND)
    assert found["selective"][1] == pytest.approx(found["none"][1], rel=1e-3)
    if GPU:
        assert found["full"][0] < found["selective"][0] < found["none"][0], found


def packed_losses(case: Case) -> list[float]:
    engine = start(case)
    found = []
    for number in range(2):
        batches = on_device(case, number)
        positions = torch.cat([torch.arange(5), torch.arange(case.seq_len - 5)]).to(case.device)
        packed = [
            dataclasses.replace(
                batch, position_ids_BT=positions.expand_as(batch.input_ids_BT).contiguous(), packed=True
            )
            for batch in batches
        ]
        found.append(float(engine.train_step(packed, lr=case.lr).loss))
    return found


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), ("bf16_mixed", 2e-3), ("fp16_mixed", 5e-4)])
def test_packed_rows_have_the_losses_of_the_cpu(precision, limit):
    (ours,) = run_ranks(1, packed_losses, Case(precision=precision, device=DEVICE), backend=BACKEND)
    (theirs,) = run_ranks(1, packed_losses, Case(precision=precision))
    assert ours == pytest.approx(theirs, rel=limit)


def saved_and_resumed(case: Case, path: Path) -> tuple[float, float]:
    """The loss of the step after a save: of the engine that saved, and of one that loaded."""
    engine = start(case)
    engine.train_step(on_device(case, 0), lr=case.lr)
    engine.save(path, Progress(1, 0, {})).result()
    config = case.config()
    layout = layouts.resolve(config.parallel, world_size=1)
    plan = plan_batch(config.batch, layout=layout, seq_len=case.seq_len)
    other = engines.build_for(None, config, layout=layout, plan=plan, device=engine.device, initial=False)
    other.load(path)
    return tuple(float(each.train_step(on_device(case, 1), lr=case.lr).loss) for each in (engine, other))


@pytest.mark.parametrize("precision", ["bf16_mixed", "fp16_mixed"])
def test_a_saved_state_goes_on_with_the_same_loss(tmp_path, precision):
    ((went_on, resumed),) = run_ranks(
        1, saved_and_resumed, Case(precision=precision, device=DEVICE), tmp_path / "saved", backend=BACKEND
    )
    assert went_on == resumed
