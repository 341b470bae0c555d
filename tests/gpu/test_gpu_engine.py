"""The engine on NVIDIA GPUs, NCCL between them: parity with the plain process on the CPU, compilation,
memory. Run: pytest -m gpu tests/gpu"""

import pytest
import torch

from hybridtrain.plan.notation import parse
from tests.cases import Case, differences, model, on_ranks, reference, start
from tests.ranks import run_ranks

GPUS = torch.cuda.device_count()  # asks the driver without initialising CUDA here
BACKEND = "cpu:gloo,cuda:nccl"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="no NVIDIA GPU")]

BOUNDS = {
    # other kernels, so other sums, than the CPU's
    "fp32": {"loss_rel": 1e-5, "grad_norm_rel": 1e-4, "grad_rel": 1e-4},
    "bf16_mixed": {"loss_rel": 1e-3, "grad_norm_rel": 1e-2, "grad_rel": 5e-2},
    "fp16_mixed": {"loss_rel": 2e-4, "grad_norm_rel": 2e-3, "grad_rel": 1e-2},
    "bf16_pure": {"loss_rel": 3e-3, "grad_norm_rel": 2e-2, "grad_rel": 5e-2},
}
LAYOUTS = (
    "single",
    "tp2",
    "pp2",
    "dp_replicate2",
    "dp_shard2-zero3",
    "pp2-zbv_zero_bubble",
    "dp_shard2-tp2-zero3",
    "pp2-tp2",
    "pp2-dp_shard2-tp2",
)


def world(layout: str) -> int:
    size = 1
    for axis in ("pp", "dp_replicate", "dp_shard", "tp"):
        size *= parse(layout).get(axis, 1)
    return size


def assert_close(case: Case) -> None:
    found = differences(on_ranks(case), reference(case))
    for key, bound in BOUNDS[case.precision].items():
        assert found[key] < bound, found


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parity_with_the_plain_process(layout, precision):
    if world(layout) > GPUS:
        pytest.skip(f"{layout} wants {world(layout)} GPUs, here are {GPUS}")
    assert_close(Case(layout, model("qwen3"), precision=precision, device="cuda"))


@pytest.mark.parametrize("precision", ["fp32", "bf16_mixed"])
def test_compilation_with_inductor(precision):
    assert_close(Case(precision=precision, device="cuda", overrides=(("engine.compile", True),)))


def peak_memory(case: Case) -> int:
    """Bytes above what weights and optimizer state take, at the peak of the second step."""
    engine = start(case)
    engine.train_step(case.batches(0, dp_rank=0, dp=1), lr=case.lr)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    engine.train_step(case.batches(1, dp_rank=0, dp=1), lr=case.lr)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def test_recomputation_saves_memory():
    fields = model(num_hidden_layers=8, hidden_size=256, intermediate_size=1024, max_position_embeddings=1024)
    peaks = {}
    for kind in ("none", "selective", "full"):
        case = Case(
            fields=fields,
            seq_len=1024,
            global_batch_size=4,
            micro_batch_size=4,
            device="cuda",
            overrides=(("recompute.kind", kind),),
        )
        (peaks[kind],) = run_ranks(1, peak_memory, case, backend=BACKEND)
    assert peaks["full"] < peaks["selective"] < peaks["none"], peaks


def scales_after_overflow(case: Case) -> list[tuple[float, float]]:
    engine = start(case)
    found = []
    for number in range(case.steps):
        result = engine.train_step(case.batches(number, dp_rank=0, dp=1), lr=case.lr)
        found.append((float(result.loss_scale), float(result.skipped)))
    return found


def test_a_loss_scale_that_overflows_fp16_is_backed_off():
    overrides = (("precision.init_scale", 2.0**40), ("precision.backoff_factor", 2.0**-32))
    (found,) = run_ranks(
        1,
        scales_after_overflow,
        Case(precision="fp16_mixed", device="cuda", overrides=overrides),
        backend=BACKEND,
    )
    assert found == [(2.0**40, 1.0), (2.0**8, 0.0)]
