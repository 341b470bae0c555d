"""engine=deepspeed trains the same tokens to the same losses, gradient norms, gradients and
parameters as one plain process.

As tests/engine/test_parity.py: fp32, accumulation, clipping that bites, a different number of
valid tokens in every row.
"""

from typing import Any

import pytest
import torch

from tests.cases import Case, assert_parity, deepspeed, differences, model, on_ranks, reference, start
from tests.ranks import run_ranks

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "layout",
    [
        "single",
        pytest.param("dp_replicate2", marks=pytest.mark.slow),
        "dp_shard2-zero1",
        "dp_shard2-zero2",
        pytest.param("dp_shard2-zero3", marks=SLOW),  # by default with recomputation
        pytest.param("dp_shard4-zero1", marks=SLOW),
        pytest.param("dp_shard4-zero2", marks=SLOW),
        pytest.param("dp_shard4-zero3", marks=SLOW),
        "tp2-nosp",
        pytest.param("tp4-nosp", marks=SLOW),
        pytest.param("dp_shard2-tp2-zero1-nosp", marks=SLOW),
        pytest.param("dp_shard2-tp2-zero2-nosp", marks=SLOW),
        pytest.param("dp_shard2-tp2-zero3-nosp", marks=SLOW),  # by default with biases: qwen2
        "pp2-cut1",
        pytest.param("pp2", marks=SLOW),
        pytest.param("pp4", marks=SLOW),
        "pp2-dp_shard2",
        pytest.param("pp2-dp_replicate2", marks=SLOW),
        pytest.param("pp2-tp2-nosp", marks=SLOW),  # by default with tied embeddings
        pytest.param("pp2-dp_shard2-tp2-nosp", marks=SLOW),
    ],
)
def test_every_layout(layout):
    assert_parity(deepspeed(layout))


@pytest.mark.parametrize(
    "layout",
    [
        "dp_shard2-zero3",
        "pp2-tp2-nosp",
        *(pytest.param(name, marks=SLOW) for name in ("dp_shard2-zero1", "tp2-nosp", "pp2")),
    ],
)
@pytest.mark.parametrize(
    "fields",
    [
        model("qwen3", tie_word_embeddings=True),
        pytest.param(model("llama", tie_word_embeddings=True), marks=SLOW),
    ],
    ids=["qwen3", "llama"],
)
def test_tied_embeddings(layout, fields):
    assert_parity(deepspeed(layout, fields))


@pytest.mark.parametrize("layout", ["dp_shard2-tp2-zero3-nosp", pytest.param("pp2-tp2-nosp", marks=SLOW)])
@pytest.mark.parametrize(
    "family", [pytest.param("mistral", marks=SLOW), "qwen2", pytest.param("qwen3", marks=SLOW)]
)
def test_every_family(layout, family):
    extra = {"sliding_window": 6} if family == "mistral" else {}
    assert_parity(deepspeed(layout, model(family, **extra)))


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        ("dp_shard2-zero3", "full"),
        pytest.param("dp_shard2-zero1", "selective", marks=SLOW),
        pytest.param("pp2-tp2-nosp", "full", marks=SLOW),
        pytest.param("pp2", "selective", marks=SLOW),
    ],
)
def test_recomputation(layout, kind):
    assert_parity(deepspeed(layout, overrides=(("recompute.kind", kind),)))


@pytest.mark.parametrize("layout", ["dp_shard2-zero1", pytest.param("pp2", marks=SLOW)])
def test_without_clipping(layout):
    assert_parity(deepspeed(layout, overrides=(("optim.clip", 0.0),)))


@pytest.mark.parametrize(
    "layout",
    ["dp_shard2-zero1", *(pytest.param(name, marks=SLOW) for name in ("dp_shard2-zero2", "dp_shard2-zero3"))],
)
def test_optimizer_offloaded_to_the_cpu(layout):
    assert_parity(deepspeed(layout, overrides=(("engine.offload_optimizer", "cpu"),)))


def test_parameters_offloaded_to_the_cpu():
    assert_parity(
        deepspeed(
            "dp_shard2-zero3",
            overrides=(("engine.offload_optimizer", "cpu"), ("engine.offload_parameters", "cpu")),
        )
    )


@pytest.mark.parametrize(
    "layout",
    [
        "dp_shard2-zero3",
        *(
            pytest.param(name, marks=SLOW)
            for name in ("pp2-dp_shard2", "dp_shard2-zero1", "dp_shard2-zero2", "tp2-nosp")
        ),
    ],
)
def test_bf16_agrees_with_the_torch_engine(layout):
    """Nearer to each other than either is to the plain process, which casts at other places."""
    ours = on_ranks(deepspeed(layout, precision="bf16_mixed"))
    torchs = on_ranks(Case(layout, precision="bf16_mixed"))
    found = differences(ours, torchs)
    limit = 1e-2 if "tp" in layout else 1e-4
    assert found["loss_rel"] < limit / 10, found
    assert found["grad_norm_rel"] < limit, found
    assert found["param_abs"] < 2 * 1e-3 * 3, found
    assert differences(ours, reference(Case(layout, precision="bf16_mixed")))["loss_rel"] < 1e-3


def overflow(case: Case) -> list[tuple[float, float, float]]:
    """(loss, skipped, scale) of steps among which one has an infinite gradient on one rank."""
    torch.manual_seed(0)
    engine = start(case)
    found = []
    for number in range(8):
        batches = case.batches(number, dp_rank=engine.mesh.dp_rank, dp=engine.layout.dp)
        handles: list[Any] = []
        if number == 3 and torch.distributed.get_rank() == 0:
            layer = next(layer for _, layer in engine.stage.layer_modules())
            overflow = lambda module, into, out: tuple(None if g is None else g * float("inf") for g in into)  # noqa: ARG005, E731
            handles.append(layer.register_full_backward_hook(overflow))
            handles.append(engine.named[-1][1].register_hook(lambda gradient: gradient * float("inf")))
        result = engine.train_step(batches, lr=case.lr)
        for handle in handles:
            handle.remove()
        found.append((float(result.loss), float(result.skipped), float(result.loss_scale)))
    return found


@pytest.mark.parametrize(
    "layout",
    [
        "dp_shard2-zero3",
        "pp2",
        *(pytest.param(name, marks=SLOW) for name in ("dp_shard2-zero1", "dp_shard2-zero2")),
    ],
)
def test_fp16_skips_a_planted_overflow_on_every_rank_and_recovers(layout):
    scaled = (
        ("precision.init_scale", 1024.0),
        ("precision.growth_interval", 2),
        ("precision.hysteresis", 1),
    )
    ranks = run_ranks(2, overflow, deepspeed(layout, precision="fp16_mixed", overrides=scaled))
    assert all(found == ranks[0] for found in ranks)
    assert [skipped for _, skipped, _ in ranks[0]] == [0, 0, 0, 1, 0, 0, 0, 0]
    # as on the torch engine: DeepSpeed's own scale would begin to count one step later
    assert [scale for _, _, scale in ranks[0]] == [1024, 1024, 2048, 2048, 1024, 1024, 2048, 2048]


@pytest.mark.parametrize("precision", ["bf16_mixed", pytest.param("fp32", marks=SLOW)])
@pytest.mark.parametrize("layout", ["dp_shard2-zero1", pytest.param("dp_shard2-zero3", marks=SLOW), "pp2"])
def test_a_step_that_is_not_finite_changes_nothing(layout, precision):
    ranks = run_ranks(2, overflow, deepspeed(layout, precision=precision))
    assert all([skipped for _, skipped, _ in found] == [0, 0, 0, 1, 0, 0, 0, 0] for found in ranks)
    assert all(torch.isfinite(torch.tensor([loss for loss, _, _ in found])).all() for found in ranks)
