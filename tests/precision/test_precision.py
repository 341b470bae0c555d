"""Mixed precision: parity within a recipe, fp32 masters and accumulation, and overflows that every
rank skips together."""

import itertools
from typing import Any

import pytest
import torch

from hybridtrain.config.schema import PrecisionConfig
from hybridtrain.precision.loss_scale import LossScaler
from hybridtrain.types import Batch
from tests.cases import Case, differences, model, on_ranks, reference, start, whole
from tests.ranks import run_ranks

SLOW = pytest.mark.slow
TOLERANCE = {
    # one rounding of a bf16 number is 2^-9 = 0.2 %, of an fp16 number 2^-12 = 0.02 %; a gradient
    # is many roundings in another order, most of all under tp, where # partial products are
    # rounded before they are added
    "bf16_mixed": {"loss_rel": 1e-3, "grad_norm_rel": 1e-2, "grad_rel": 5e-2},
    "fp16_mixed": {"loss_rel": 2e-4, "grad_norm_rel": 2e-3, "grad_rel": 1e-2},  # tp2, six seeds: 4e-3 to 8e-3
    # each update is rounded to bf16 too
    "bf16_pure": {"loss_rel": 3e-3, "grad_norm_rel": 2e-2, "grad_rel": 5e-2},
}
LAYOUTS = ("single", "tp2", "pp2", "dp_shard2-zero3", "pp2-dp_shard2-zero2", "pp2-zbv_zero_bubble")


@pytest.mark.parametrize(
    ("precision", "layout"),
    [
        pytest.param(kind, layout, marks=SLOW if kind != "bf16_mixed" and "pp2" in layout else ())
        for kind, layout in itertools.product(TOLERANCE, LAYOUTS)
    ],
)
def test_parity_within_a_recipe(precision, layout):
    case = Case(layout, model("qwen3"), precision=precision)
    found = differences(on_ranks(case), reference(case))
    for key, bound in TOLERANCE[precision].items():
        assert found[key] < bound, (key, found)
    # Adam's first steps are +-lr
    assert found["param_abs"] < (2 * case.lr if precision != "bf16_pure" else 8e-3) * case.steps, found


def dtypes(case: Case) -> dict[str, set[torch.dtype]]:
    engine = start(case)
    seen: dict[str, set[torch.dtype]] = {"matmul": set(), "grad": set()}
    for stage in engine.stages:
        for _, layer in stage.layer_modules():
            layer.mlp.down_proj.register_forward_hook(
                lambda module, inputs, output: seen["matmul"].update(
                    {inputs[0].dtype, module.weight.dtype, output.dtype}
                )
            )
    update = engine.optimizer.step

    def observe(**arguments: Any) -> None:
        seen["grad"].update(parameter.grad.dtype for _, parameter in engine._named())
        update(**arguments)

    engine.optimizer.step = observe
    result = engine.train_step(case.batches(0, dp_rank=engine.mesh.dp_rank, dp=engine.layout.dp), lr=1e-3)
    return {
        **seen,
        "param": {parameter.dtype for _, parameter in engine.weights()},
        "optim": {
            value.dtype
            for key, value in engine.optimizer.state().items()
            if not key.endswith((".step", ".compensation"))
        },
        "result": {result.loss.dtype, result.grad_norm.dtype},
    }


@pytest.mark.parametrize("layout", ["single", "tp2", "dp_shard2-zero3", "pp2-zbv_zero_bubble"])
@pytest.mark.parametrize(
    ("precision", "stored", "compute"),
    [
        ("fp32", torch.float32, torch.float32),
        ("bf16_mixed", torch.float32, torch.bfloat16),
        ("fp16_mixed", torch.float32, torch.float16),
        ("bf16_pure", torch.bfloat16, torch.bfloat16),
    ],
)
def test_each_role_has_its_dtype(layout, precision, stored, compute):
    for found in run_ranks(Case(layout).world_size, dtypes, Case(layout, precision=precision)):
        assert found == {
            "matmul": {compute},
            "grad": {stored},
            "param": {stored},
            "optim": {stored},
            "result": {torch.float32},
        }


def norms_and_softmax(case: Case) -> tuple[float, float]:
    """Largest deviation of a norm from fp32 arithmetic on its bf16 input, relative to one bf16 rounding; and
    the softmax's sums."""
    engine = start(case)
    seen = []
    norm = engine.stages[0].part("model.norm")
    norm.register_forward_hook(
        lambda module, inputs, output: seen.append(
            (inputs[0].detach().double(), module.weight.detach().double(), output.detach().double())
        )
    )
    weights = []
    engine.stages[0].part("model.layers.0.self_attn").register_forward_hook(
        lambda *call: weights.append(call[2][1].detach().double())
    )
    engine.eval_step(case.batches(0, dp_rank=0, dp=1))
    x, weight, y = seen[0]
    exact = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon) * weight
    return float(((y - exact).abs() / exact.abs().clamp(min=1e-6)).max()) / 2**-8, float(
        (weights[0].sum(-1) - 1.0).abs().max()
    )


def test_norms_and_softmax_are_computed_in_fp32():
    case = Case(precision="bf16_mixed", overrides=(("model.attention", "eager"),))
    ((norm, softmax),) = run_ranks(1, norms_and_softmax, case)
    assert norm < 1.01  # two roundings of the result to bf16, nothing lost on the way
    assert softmax < 16 * 2**-9 / 2  # each weight is rounded once; a sum made in bf16 would be off by more


# -- accumulation --------------------------------------------------------------------------------------------


def gradients_of_equal_rows(case: Case) -> dict[str, torch.Tensor]:
    """Gradients of a global batch of equal rows."""
    engine = start(case)
    gradients: dict[str, torch.Tensor] = {}

    def observe(**_: Any) -> None:
        gradients.update({name: whole(parameter.grad) for name, parameter in engine._named()})

    engine.optimizer.step = observe
    ids, labels = case.rows(0)
    batch = Batch(ids[:1], labels[:1], torch.arange(case.seq_len)[None])
    engine.train_step([batch] * engine.plan.grad_accum, lr=0.0)
    return gradients


@pytest.mark.parametrize(
    "layout",
    [
        "single",
        "dp_shard2-zero3",
        "dp_replicate2",
        "pp2",
        "pp2-zbv_zero_bubble",
        "pp2-dp_shard2-zero2",
        *(pytest.param(name, marks=SLOW) for name in ("dp_shard2-zero1", "pp2-interleaved_zero_bubble")),
    ],
)
def test_gradients_accumulate_and_reduce_in_fp32(layout):
    """n equal bf16 gradients, each 1/n as large, add up to one exactly in fp32 for n = 64; in bf16 the sum
    would be rounded 64 times."""
    one = run_ranks(
        1,
        gradients_of_equal_rows,
        Case("single", precision="bf16_mixed", global_batch_size=1, micro_batch_size=1, steps=1),
    )[0]
    many = run_ranks(
        Case(layout).world_size,
        gradients_of_equal_rows,
        Case(layout, precision="bf16_mixed", global_batch_size=64, micro_batch_size=1, steps=1),
    )
    for rank in many:
        assert rank
        for name, gradient in rank.items():
            assert torch.equal(gradient, one[name]), name


@pytest.mark.parametrize(
    "schedule",
    [
        *("1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble"),
        *(pytest.param(name, marks=SLOW) for name in ("gpipe", "dualpipev")),
    ],
)
def test_schedules_accumulate_different_gradients_in_fp32(schedule):
    """Each micro-batch's bf16 gradient is the same under every schedule, so fp32 sums agree to rounding; one
    sum in bf16 is off by 2^-9.

    Every token has a label: divided by 128 tokens nothing is rounded, so it does not matter whether that
    happens before or after adding up.
    """
    cases = (
        Case(layout, precision="bf16_mixed", micro_batch_size=1, steps=1, uneven=False)
        for layout in ("single", f"pp2-{schedule}")
    )
    single, piped = (on_ranks(case).gradients for case in cases)
    assert single.keys() == piped.keys()
    worst = max(float((piped[name] - gradient).norm() / gradient.norm()) for name, gradient in single.items())
    assert worst < 1e-6


# -- overflow ------------------------------------------------------------------------------------------------


def run_with_overflows(case: Case, planted: tuple[int, ...], rank: int) -> list[dict[str, Any]]:
    """What each step did; in the steps `planted` one rank's gradient is made infinite."""
    import torch.distributed as dist

    engine = start(case)
    now = {"plant": False}

    def plant(module: Any, inputs: Any, output: torch.Tensor) -> None:  # noqa: ARG001
        if now["plant"] and output.requires_grad:
            output.register_hook(lambda grad: grad * float("inf"))

    if dist.get_rank() == rank:
        layer = next(layer for _, layer in engine.stages[0].layer_modules())
        layer.mlp.gate_proj.register_forward_hook(plant)
    found = []
    for number in range(case.steps):
        before = [value.clone() for value in engine.state().values() if value.dim()]
        now["plant"] = number in planted
        result = engine.train_step(
            case.batches(number, dp_rank=engine.mesh.dp_rank, dp=engine.layout.dp), lr=case.lr
        )
        after = [value for value in engine.state().values() if value.dim()]
        same = all(torch.equal(local(a), local(b)) for a, b in zip(before, after, strict=True))
        counts = {float(value) for key, value in engine.optimizer.state().items() if key.endswith(".step")}
        found.append(
            {
                "skipped": float(result.skipped),
                "scale": float(result.loss_scale),
                "unchanged": same,
                "adam_steps": counts,
            }
        )
    return found


def local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


SCALING = (
    ("precision.init_scale", 1024.0),
    ("precision.growth_interval", 2),
    ("precision.hysteresis", 1),
)


@pytest.mark.parametrize(
    "layout",
    [
        *("dp_shard2-tp2-zero1", "dp_shard2-zero3", "pp2-dp_shard2-zbv_zero_bubble"),
        pytest.param("pp2-dp_replicate2", marks=SLOW),
    ],
)
def test_an_overflow_on_one_rank_is_skipped_by_all(layout):
    case = Case(layout, precision="fp16_mixed", steps=6, overrides=SCALING)
    # in a pipeline, rank 1 is in the first stage: what follows it stays finite
    ranks = run_ranks(case.world_size, run_with_overflows, case, (2,), 1)
    for found in ranks:
        assert [step["skipped"] for step in found] == [0, 0, 1, 0, 0, 0]
        # growth, back-off, growth
        assert [step["scale"] for step in found] == [1024, 1024, 2048, 1024, 1024, 2048]
        assert [step["unchanged"] for step in found] == [False, False, True, False, False, False]
        assert [step["adam_steps"] for step in found] == [{1.0}, {2.0}, {2.0}, {3.0}, {4.0}, {5.0}]


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        *(("single", kind) for kind in ("fp32", "bf16_mixed", "bf16_pure")),
        ("pp2-dp_replicate2", "bf16_mixed"),
        *(pytest.param("pp2-dp_replicate2", kind, marks=SLOW) for kind in ("fp32", "bf16_pure")),
    ],
)
def test_a_step_that_is_not_finite_is_skipped_in_every_recipe(layout, precision):
    case = Case(layout, precision=precision, steps=3)
    for found in run_ranks(case.world_size, run_with_overflows, case, (1,), 0):
        assert [(step["skipped"], step["unchanged"], step["scale"]) for step in found] == [
            (0, False, 1),
            (1, True, 1),
            (0, False, 1),
        ]
        assert [step["adam_steps"] for step in found] == [{1.0}, {1.0}, {2.0}]


def test_the_scale_grows_backs_off_and_has_a_floor():
    settings = PrecisionConfig(
        kind="fp16_mixed",
        init_scale=4.0,
        growth_factor=3.0,
        backoff_factor=0.25,
        growth_interval=2,
        min_scale=0.5,
        hysteresis=1,
    )
    scaler = LossScaler(settings, device=torch.device("cpu"))
    scales = []
    for nonfinite in (0, 0, 0, 1, 0, 0, 1, 1, 1, 0):
        scaler.update(torch.tensor(float(nonfinite)), empty=torch.tensor(0.0))
        scales.append(float(scaler.scale))
    assert scales == [4.0, 12.0, 12.0, 3.0, 3.0, 9.0, 2.25, 0.5625, 0.5, 0.5]
    assert int(scaler.state()["scaler.growth_tracker"]) == 1


def test_without_loss_scaling_the_scale_stays_one():
    scaler = LossScaler(PrecisionConfig(), device=torch.device("cpu"))
    scaler.update(torch.tensor(1.0), empty=torch.tensor(0.0))
    assert float(scaler.scale) == 1.0
    assert scaler.state() == {}
