"""One GPU: formats of linear layers by its own kernels, states of the optimizer, the monitor, windows.

Run: pytest -m gpu tests/gpu. With REHEARSE=1 they run on the CPU, beside itself.
"""

import dataclasses
from typing import Any

import pytest
import torch

from hybridtrain.plan.formats import FORMATS
from hybridtrain.precision.numerics import Sample
from hybridtrain.precision.qlinear import Product, product
from tests.cases import Case, differences, model, on_ranks
from tests.gpu.test_gpu_step import BACKEND, COMPILED, DEVICE, GPU, REHEARSE, packed_losses
from tests.parallel.test_monitor import check_alike, samples_of
from tests.ranks import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not (GPU or REHEARSE), reason="no NVIDIA GPU")]


def close(case: Case, other: Case, *, loss: float, norm: float, gradients: float) -> None:
    found = differences(on_ranks(case), on_ranks(other))
    assert found["loss_rel"] < loss, found
    assert found["grad_norm_rel"] < norm, found
    assert found["grad_rel"] < gradients, found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("compute", ["fp8_tensorwise", "fp8_rowwise"])
def test_the_kernels_of_a_gpu_compute_what_is_emulated(compute: str, dtype: torch.dtype) -> None:
    """The codes are the same; the sums are in another order, those of the output in less than fp32."""
    draw = torch.Generator().manual_seed(0)
    x, w, g = (torch.randn(size, generator=draw) for size in ((256, 512), (192, 512), (256, 192)))
    found = []
    for native in (GPU, False):
        own_x, own_w = (each.to(DEVICE, dtype).requires_grad_() for each in (x * 3, w / 5))
        y = product(own_x, own_w, Product(FORMATS[compute], cut="", ranks=None, native=native))
        y.backward(g.to(DEVICE, dtype))
        found.append([y, own_x.grad, own_w.grad])
    for ours, emulated in zip(*found, strict=True):
        assert float(((ours - emulated).norm() / emulated.norm()).detach()) < 5e-3


@pytest.mark.parametrize("compute", ["fp8_tensorwise", "fp8_rowwise"])
def test_a_compiled_step_in_fp8(compute: str) -> None:
    """Fusions round less often to bf16, so that some numbers get another code of 8 bits."""
    case = Case(precision="bf16_mixed", device=DEVICE, overrides=(("precision.compute", compute),))
    compiled = dataclasses.replace(case, overrides=case.overrides + COMPILED)
    close(compiled, case, loss=1e-2, norm=5e-2, gradients=0.4)


@pytest.mark.parametrize(
    ("precision", "overrides"),
    [
        ("bf16_mixed", {"precision.compute": "fp8_tensorwise"}),
        ("bf16_mixed", {"precision.compute": "fp8_rowwise"}),
        ("fp32", {"precision.compute": "int8", "precision.emulate": True}),
        ("fp32", {"precision.compute": "mxfp8", "precision.emulate": True}),
        ("fp32", {"precision.compute": "bf16"}),
        ("fp64", {}),
        ("tf32", {}),
        ("fp32", {"precision.state": "8bit"}),
        ("bf16_mixed", {"precision.state": "bf16"}),
        ("bf16_pure", {"precision.rounding": "stochastic"}),
    ],
)
def test_a_gpu_trains_as_the_cpu_does(precision: str, overrides: dict[str, Any]) -> None:
    given = {"fields": model(hidden_size=128, intermediate_size=256), "precision": precision}
    emulated = {"precision.emulate": True} if precision == "tf32" else {}
    on_cpu = Case(overrides=tuple((overrides | emulated).items()), **given)
    ours = Case(device=DEVICE, overrides=tuple(overrides.items()) if GPU else on_cpu.overrides, **given)
    if precision == "fp64":
        close(ours, on_cpu, loss=1e-12, norm=1e-12, gradients=1e-10)
    else:
        close(ours, on_cpu, loss=3e-3, norm=2e-2, gradients=0.15 if "fp8" in str(overrides) else 5e-2)


def sample(case: Case) -> Sample:
    return run_ranks(1, samples_of, case, backend=BACKEND if case.device == "cuda" else "gloo")[0][0]


@pytest.mark.parametrize("compiled", [False, True])
def test_the_monitor_sees_what_it_sees_on_the_cpu(compiled: bool) -> None:
    given = {"seq_len": 64, "overrides": (("precision.monitor_every", 2),)}
    theirs = sample(Case(**given))
    ours = sample(Case(device=DEVICE, **(given | {"overrides": given["overrides"] + COMPILED * compiled})))
    check_alike(ours, theirs, rel=1e-3, share=2e-3)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_packed_rows_of_models_with_windows(family: str, compiled: bool) -> None:
    fields = model(family, max_position_embeddings=512, sliding_window=48)
    given: dict[str, Any] = {"fields": fields, "seq_len": 320, "global_batch_size": 4}
    case = Case(device=DEVICE, overrides=COMPILED * compiled, **given)
    (ours,) = run_ranks(1, packed_losses, case, backend=BACKEND)
    (theirs,) = run_ranks(1, packed_losses, Case(**given))
    assert ours == pytest.approx(theirs, rel=1e-5)
