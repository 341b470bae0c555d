"""The numerics monitor finds the same under every layout: bit-equal histograms and largest magnitudes without
tensor parallelism, equal totals and shares to 1e-3 with it."""

import functools
import math
from typing import Any

import pytest
import torch

from hybridtrain.config.schema import PrecisionConfig
from hybridtrain.errors import UserError
from hybridtrain.parallel.monitor import Monitor
from hybridtrain.plan.formats import NUMBERS
from hybridtrain.precision.histogram import shares
from hybridtrain.precision.numerics import Sample, Statistics
from tests import cases
from tests.cases import Case, model
from tests.families.copies import fields_of
from tests.ranks import run_ranks

COMPILED = (("engine.compile", True), ("engine.compile_backend", "aot_eager"))
WATCHED = (("precision.monitor_every", 2),)


def monitor_of(engine: Any, case: Case) -> Monitor:
    settings = case.config().precision
    return Monitor(engine.monitored(), every=2, patterns=settings.monitor_modules, precision=settings)


def samples_of(case: Case) -> list[Sample]:
    """Of steps 1 and 2; step 3 is not sampled."""
    torch.manual_seed(0)
    engine, found = cases.start(case), []
    monitor = monitor_of(engine, case)
    for step in range(3):
        batches = case.batches(step, dp_rank=engine.mesh.dp_rank, dp=engine.layout.dp)
        with monitor.sampling(step + 1):
            result = engine.train_step(batches, lr=case.lr)
        if monitor.step == step + 1:
            found.append(monitor.sample(result))
    return found


@functools.cache
def single(fields: tuple[tuple[str, Any], ...], length: int) -> list[Sample]:
    return run_ranks(1, samples_of, Case("single", model(**dict(fields)), seq_len=length))[0]


def samples(layout: str, *overrides: tuple[str, Any], length: int, **fields: Any) -> tuple[Sample, Sample]:
    """(that of a layout, that of one process), in the first step: later, weights differ by rounding."""
    case = Case(layout, model(**fields), seq_len=length, overrides=overrides)
    found = run_ranks(case.world_size, samples_of, case)
    assert all(each == found[0] for each in found), "ranks differ"
    assert [each.step for each in found[0]] == [1, 2]
    return found[0][0], single(tuple(fields.items()), length)[0]


def check_equal(layout: str, *overrides: tuple[str, Any], **fields: Any) -> None:
    ours, theirs = samples(layout, *overrides, length=16, **fields)
    assert list(ours.modules) == list(theirs.modules)
    for name, roles in theirs.modules.items():
        assert ours.modules[name].keys() == roles.keys()
        for role, expected in roles.items():
            found = ours.modules[name][role]
            assert (found.histogram, found.amax) == (expected.histogram, expected.amax), (name, role)
            assert found.rms == (None if role == "y" else pytest.approx(expected.rms, rel=1e-5))
            flat = role == "w" and ("engine.kind", "deepspeed") in overrides  # its shards have no rows
            if not flat and "dp" not in layout:  # data ranks have first micro-batches of their own
                assert found.snr == expected.snr, (name, role)
    check_updates(ours, theirs)


def test_it_counts_the_numbers_of_fp64() -> None:
    """Whose modules compute in a mode in which torch gives no fp32."""
    (ours, *_), *_ = run_ranks(1, samples_of, Case(precision="fp64"))
    theirs = single((), 16)[0]
    for name, roles in theirs.modules.items():
        for role, expected in roles.items():
            found = ours.modules[name][role]
            assert sum(found.histogram) == sum(expected.histogram), (name, role)
            assert not found.non_finite
            assert found.rms == (None if role == "y" else pytest.approx(expected.rms, rel=1e-4))


def held(case: Case) -> Sample:
    engine = cases.start(case)
    monitor = monitor_of(engine, case)
    engine.spike_limits = (0.0, 0.0)
    with monitor.sampling(1):
        result = engine.train_step(case.batches(0, dp_rank=0, dp=1), lr=case.lr)
    return monitor.sample(result)


def test_an_update_that_was_held_back_as_a_spike_is_none() -> None:
    """In bf16, where no change would look like rounding."""
    (sample,) = run_ranks(
        1, held, Case(precision="bf16_pure", overrides=(("precision.rounding", "nearest"),))
    )
    assert sample.skipped
    assert {each.ratio for each in sample.parameters.values()} == {None}


def signal(each: Statistics) -> list[int]:
    """The histogram with what is below fp32's rounding errors as zeros: the queries of a row's first position
    have no gradient, but 1e-10 of one order of a sum.
    """
    top = max(index for index, count in enumerate(each.histogram) if count)
    least = top - 20
    small = sum(each.histogram[:least])
    return [small, *[0] * (least - 1), *each.histogram[least:]]


def check_updates(ours: Sample, theirs: Sample) -> None:
    assert list(ours.parameters) == list(theirs.parameters)
    for name, expected in theirs.parameters.items():
        found = ours.parameters[name]
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4), name
        assert found.ratio == pytest.approx(expected.ratio, rel=1e-3, abs=1e-9), name


def check_alike(ours: Sample, theirs: Sample, *, rel: float, share: float) -> None:
    """Equal totals; largest magnitudes and RMS to `rel`, exponents to a `share` of the numbers."""
    assert list(ours.modules) == list(theirs.modules)
    for name, roles in theirs.modules.items():
        for role, expected in roles.items():
            if role == "y":
                continue
            found = ours.modules[name][role]
            assert sum(found.histogram) == sum(expected.histogram), (name, role)
            assert found.amax == pytest.approx(expected.amax, rel=rel), (name, role)
            assert found.rms == pytest.approx(expected.rms, rel=rel), (name, role)
            for form in ("e4m3", "e5m2", "fp16", "bf16"):
                mine, other = (shares(signal(each), NUMBERS[form], scale=0) for each in (found, expected))
                assert mine.underflow == pytest.approx(other.underflow, abs=share), (name, role, form)
                assert mine.overflow == pytest.approx(other.overflow, abs=share), (name, role, form)
            moved = sum(abs(a - b) for a, b in zip(signal(found), signal(expected), strict=True)) / 2
            assert moved <= share * sum(expected.histogram), (name, role)


def check_shares(layout: str, *overrides: tuple[str, Any], **fields: Any) -> None:
    ours, theirs = samples(layout, *overrides, length=64, **fields)
    check_alike(ours, theirs, rel=1e-4, share=1e-3)
    check_updates(ours, theirs)


def test_a_split_backward_pass_and_recomputation_change_nothing() -> None:
    check_equal("pp2-zbv_zero_bubble", ("recompute.kind", "full"))


def test_tensor_parallel_ranks_count_each_number_once() -> None:
    check_shares("tp2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "overrides"),
    [
        ("pp2", ()),
        ("dp_shard2-zero3", ()),
        ("dp_shard2-zero1", ()),
        ("dp_replicate2", ()),
        ("pp2-dp_shard2-zero1", ()),
        ("pp2-interleaved_1f1b", ()),
        ("single", (("recompute.kind", "full"),)),
        ("single", (("recompute.kind", "selective"),)),
        ("single", COMPILED),
        ("pp2", (*COMPILED, ("recompute.kind", "selective"))),
    ],
)
def test_bit_equal(layout: str, overrides: tuple[tuple[str, Any], ...]) -> None:
    check_equal(layout, *overrides)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["pp2", "dp_shard2-zero3", "pp2-zbv_zero_bubble"])
def test_a_tied_matrix_counts_once(layout: str) -> None:
    check_equal(layout, tie_word_embeddings=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        ("tp2-nosp", {}),
        ("pp2-tp2", {}),
        ("dp_shard2-tp2-zero3", {}),
        ("tp2", {"tie_word_embeddings": True}),
        ("tp2", {"model_type": "qwen3"}),
    ],
)
def test_equal_shares(layout: str, fields: dict[str, Any]) -> None:
    check_shares(layout, **fields)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["single", "dp_shard2-zero1", "dp_shard2-zero2", "pp2"])
def test_deepspeed(layout: str) -> None:
    check_equal(layout, ("engine.kind", "deepspeed"))


@pytest.mark.slow
def test_deepspeed_zero3() -> None:
    """It has linear layers of its own, which round differently."""
    check_shares("dp_shard2-zero3", ("engine.kind", "deepspeed"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        ("tp2", {"num_key_value_heads": 1}),
        ("tp2", {"model_type": "qwen3", "num_key_value_heads": 1}),
        ("tp4", {"model_type": "qwen3", "num_key_value_heads": 2}),
    ],
)
def test_key_value_heads_that_ranks_share_count_once(layout: str, fields: dict[str, Any]) -> None:
    """But for their gradients: each rank has the part that comes from its query heads."""
    ours, theirs = samples(layout, length=64, **fields)
    for name, roles in theirs.modules.items():
        for role, expected in roles.items():
            if role != "y":
                found = ours.modules[name][role]
                assert sum(found.histogram) == sum(expected.histogram), (name, role)
                if not (role == "g" and name.rpartition(".")[2] in ("k_proj", "v_proj", "k_norm")):
                    assert found.rms == pytest.approx(expected.rms, rel=1e-4), (name, role)


def test_sampled_steps_leave_no_hook_and_other_steps_have_none() -> None:
    engine, case = cases.start(Case()), Case()
    monitor = monitor_of(engine, case)
    seen: list[str] = []
    monitor.forward = lambda call, *_: seen.append(call.name)  # type: ignore[method-assign]
    hooks = {name: vars(module).copy() for name, module in engine.modules()}
    for step in (1, 2, 3, 5):
        before = len(seen)
        monitor.again = step == 5
        with monitor.sampling(step):
            engine.train_step(case.batches(0, dp_rank=0, dp=1), lr=0.0)
        assert (len(seen) > before) == (step != 3)
        assert {name: vars(module).keys() for name, module in engine.modules()} == {
            name: each.keys() for name, each in hooks.items()
        }
        assert not any(module._forward_hooks or module._backward_hooks for _, module in engine.modules())
        assert not engine.optimizer.watch


def test_a_pattern_that_matches_no_module_is_refused() -> None:
    engine = cases.start(Case())
    with pytest.raises(UserError, match="it matches no module of the model") as error:
        Monitor(engine.monitored(), every=1, patterns=["*.up_prj"], precision=PrecisionConfig())
    assert "allowed: lm_head, model.embed_tokens, *.input_layernorm, *.mlp.down_proj, " in str(error.value)
    assert "try:     precision.monitor_modules=['model.layers.*.mlp.up_proj']" in str(error.value)
    chosen = Monitor(engine.monitored(), every=1, patterns=["*.mlp.up_proj"], precision=PrecisionConfig())
    assert chosen.names == [f"model.layers.{n}.mlp.up_proj" for n in range(4)]
    assert list(chosen.parameters) == [f"{name}.weight" for name in chosen.names]


def test_what_bf16_weights_lose_of_their_update() -> None:
    """A rate of 1e-2 moves all weights, one of 1e-6 next to none; nothing is lost of fp32 weights, and of
    bf16 weights that keep what rounding cuts off.
    """
    nearest = (("precision.rounding", "nearest"),)
    name = "model.layers.1.mlp.up_proj.weight"
    large, small = (
        samples_of(Case(precision="bf16_pure", lr=rate, overrides=nearest))[0].parameters[name]
        for rate in (1e-2, 1e-6)
    )
    assert large.realised == pytest.approx(1, abs=0.05)
    assert large.lost is not None
    assert large.lost < 0.02
    assert small.realised is not None
    assert small.realised < 0.5
    assert small.lost is not None
    assert small.lost > 0.8
    for kept in (Case(), Case(precision="bf16_pure")):
        assert samples_of(kept)[0].parameters[name].realised is None


def test_gradients_are_counted_with_the_loss_scale_and_measured_without() -> None:
    plain, scaled = (samples_of(Case(precision=precision))[0] for precision in ("fp32", "fp16_mixed"))
    name = "model.layers.1.mlp.up_proj"
    one, other = plain.modules[name], scaled.modules[name]
    assert scaled.loss_scale == 65536
    for role in ("x", "g"):
        assert other[role].amax == pytest.approx(one[role].amax, rel=0.05)
        assert other[role].rms == pytest.approx(one[role].rms, rel=0.05)
    tops = [max(at for at, count in enumerate(each["g"].histogram) if count) for each in (one, other)]
    assert abs(tops[1] - tops[0] - 16) <= 1
    norms = [each.parameters[f"{name}.weight"].grad_norm for each in (plain, scaled)]
    assert norms[1] == pytest.approx(norms[0], rel=0.05)
    assert (plain.formats["x"], scaled.formats["x"]) == ("e4m3", "fp16")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "phi3", "mixtral", "gpt_oss"])
def test_other_architectures_count_each_number_once(model_type: str) -> None:
    """Conv1D, norms around blocks, fused projections, experts, sinks. The gradient of a router is a part of a
    sum on each rank.
    """
    layouts = [Case(layout, fields_of(model_type), seq_len=32) for layout in ("tp2", "single")]
    ours, theirs = (run_ranks(case.world_size, samples_of, case)[0][0] for case in layouts)
    assert list(ours.modules) == list(theirs.modules)
    for name, roles in theirs.modules.items():
        for role, expected in roles.items():
            found = ours.modules[name][role]
            assert sum(found.histogram) == sum(expected.histogram), (name, role)
            if role in ("x", "w"):
                assert found.rms == pytest.approx(expected.rms, rel=1e-3), (name, role)


def test_a_dead_input_and_a_number_that_is_not_finite_do_not_look_healthy() -> None:
    case = Case()
    engine = cases.start(case)
    monitor = monitor_of(engine, case)
    weights = dict(engine.weights())
    with torch.no_grad():
        weights["model.layers.1.input_layernorm.weight"].zero_()
        weights["model.layers.2.mlp.up_proj.weight"][3, 4] = math.inf
    with monitor.sampling(1):
        result = engine.train_step(case.batches(0, dp_rank=0, dp=1), lr=case.lr)
    sample = monitor.sample(result)
    assert sample.modules["model.layers.1.self_attn.q_proj"]["x"].amax == 0
    broken = sample.modules["model.layers.2.mlp.up_proj"]["w"]
    assert (broken.non_finite, broken.amax, broken.rms) == (1, math.inf, None)
    assert sample.skipped
    assert sample.parameters["lm_head.weight"].ratio is None
