"""Adafactor: transformers' own in one process; the same under every layout and after another's checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.optimization import Adafactor

from hybridtrain.config import checks, compose
from hybridtrain.config.schema import OptimConfig
from hybridtrain.errors import UserError
from hybridtrain.optim import optimizer
from hybridtrain.optim.shards import local_shards
from hybridtrain.optim.stored import Formats
from tests.cases import Case, differences, model, on_ranks, reference, train
from tests.engine.test_optimizer_states import watched
from tests.engine.test_state import both, load_and_go_on, save_and_go_on
from tests.families.copies import fields_of
from tests.plan.test_memory import held, needs
from tests.ranks import run_ranks

SLOW = pytest.mark.slow
OVERRIDES: tuple[tuple[str, Any], ...] = (("optim.kind", "adafactor"), ("optim.momentum", 0.0))
MOMENTUM: tuple[tuple[str, Any], ...] = (("optim.kind", "adafactor"), ("optim.momentum", 0.9))
ONE, ZERO = torch.tensor(1.0), torch.tensor(0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("shape", [(40, 30), (3, 20, 30), (50,)])
def test_updates_are_those_of_transformers(
    shape: tuple[int, ...], momentum: float, dtype: torch.dtype
) -> None:
    """Also with the gradient divided by 4, at a rate that changes, and after a skipped step, which leaves no
    trace."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=dtype)
    mine, other = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(weight.clone())
    decay = 0.1 if len(shape) > 1 else 0.0
    theirs = Adafactor(
        [other],
        lr=1e-2,
        beta1=momentum or None,
        weight_decay=decay,
        scale_parameter=False,
        relative_step=False,
    )
    ours = optimizer.build(
        local_shards([("proj.weight", mine)]),
        OptimConfig(kind="adafactor", lr=1e-2, momentum=momentum, weight_decay=0.1),
        formats=Formats("auto", "kahan", 0),
        parts={},
        group=None,
    )
    for step in range(6):
        gradient = torch.randn(shape, generator=generator, dtype=dtype) * 10**-step
        skip, lr = step == 2, 1e-2 / (step + 1)
        mine.grad = gradient * (torch.nan if skip else 4)
        ours.step(lr=lr, divide=4 * ONE.to(dtype), skip=ONE if skip else ZERO)
        if not skip:
            other.grad, theirs.param_groups[0]["lr"] = gradient, lr
            theirs.step()
    torch.testing.assert_close(mine, other, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-7)
    assert mine.grad is None


@pytest.mark.parametrize(
    ("layout", "fields", "overrides"),
    [
        ("dp_shard2-zero3", model(tie_word_embeddings=True), OVERRIDES),
        ("pp2-tp2", model(tie_word_embeddings=True), MOMENTUM),
        *(
            pytest.param(layout, fields, OVERRIDES, marks=SLOW)
            for layout, fields in (
                ("dp_replicate2", model()),
                ("dp_shard2-zero1", model()),
                ("dp_shard2-zero2", model(intermediate_size=90)),
                ("tp2", model("qwen2")),
                ("tp2", fields_of("phi3")),
                ("pp2", model()),
                ("dp_replicate2-dp_shard2-zero3", model()),
                ("dp_shard2-tp2-zero3", fields_of("mixtral")),
                ("dp_shard4-zero3", model(intermediate_size=90)),
            )
        ),
    ],
)
def test_a_layout_trains_as_one_process_does(
    layout: str, fields: dict[str, Any], overrides: tuple[tuple[str, Any], ...]
) -> None:
    case = Case(layout, fields, steps=3, overrides=overrides)
    found = differences(on_ranks(case), reference(case))
    assert found["loss_rel"] < 1e-6, found
    assert found["grad_norm_rel"] < 1e-5, found
    assert found["param_abs"] < 0.05 * case.lr, found


@pytest.mark.parametrize(
    ("before", "after", "overrides"),
    [
        ("dp_shard2-zero3", "tp2", MOMENTUM),
        *(
            pytest.param(before, after, OVERRIDES, marks=SLOW)
            for before, after in (("tp2", "pp2"), ("pp2", "dp_shard2-zero3"), ("single", "single"))
        ),
    ],
)
def test_another_layout_goes_on(
    before: str, after: str, overrides: tuple[tuple[str, Any], ...], tmp_path: Path
) -> None:
    """Also with the tied matrix on both stages."""
    fields = model(tie_word_embeddings=True)
    saved, loaded = (Case(layout, fields, steps=4, overrides=overrides) for layout in (before, after))
    losses, resumed = both(saved, loaded, tmp_path / "checkpoint")
    assert resumed == (losses if before == after else pytest.approx(losses, rel=1e-6))


def test_a_skipped_step_changes_nothing() -> None:
    """The first loss scale is too large for fp16."""
    overrides = (*MOMENTUM, ("precision.init_scale", 2.0**24))
    case = Case("dp_shard2-zero2", precision="fp16_mixed", steps=14, lr=1e-2, overrides=overrides)
    first, second = run_ranks(2, train, case)
    assert first.losses == second.losses
    assert all(torch.equal(first.parameters[name], value) for name, value in second.parameters.items())
    unseen = run_ranks(1, train, dataclasses.replace(case, layout="single", steps=0))[0].parameters
    skipped = run_ranks(2, train, dataclasses.replace(case, steps=1))[0].parameters
    assert all(torch.equal(skipped[name], value) for name, value in unseen.items())
    assert first.losses[-1] < first.losses[0]


@SLOW
def test_bf16_weights_are_compensated(tmp_path: Path) -> None:
    """And a checkpoint of theirs goes on with fp32 weights."""
    overrides = (*MOMENTUM, ("precision.rounding", "kahan"))
    case = Case("dp_shard2-zero2", precision="bf16_pure", steps=4, overrides=overrides)
    assert differences(on_ranks(case), reference(case))["loss_rel"] < 1e-3
    masters = dataclasses.replace(case, layout="tp2", precision="bf16_mixed")
    saved = run_ranks(2, save_and_go_on, case, tmp_path / "checkpoint")[0][1]
    loaded = run_ranks(2, load_and_go_on, masters, tmp_path / "checkpoint")[0][1]
    assert loaded == pytest.approx(saved, rel=1e-3)


@pytest.mark.parametrize("kind", ["adafactor", pytest.param("muon", marks=SLOW)])
def test_a_step_does_not_wait_for_the_device(kind: str) -> None:
    run_ranks(2, watched, Case("dp_shard2-zero1", overrides=(("optim.kind", kind), ("optim.momentum", 0.9))))


def test_momentum_begins_at_0_where_a_checkpoint_has_none(tmp_path: Path) -> None:
    without, momentum = (Case("single", steps=4, overrides=each) for each in (OVERRIDES, MOMENTUM))
    ((state, _),) = run_ranks(1, save_and_go_on, without, tmp_path / "checkpoint")
    ((loaded, _),) = run_ranks(1, load_and_go_on, momentum, tmp_path / "checkpoint")
    moments = [value for key, value in loaded.items() if key.endswith(".exp_avg")]
    assert moments
    assert not any(value.any() for value in moments)
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.nesterov=true", "optim.momentum=0.9"], r"optim\.kind=adafactor reads none"),
        (["optim.betas=[0.9,0.9]"], r"optim\.betas=.*optim\.kind=adafactor reads none"),
        (["optim.eps=1e-6"], r"optim\.eps=.*optim\.kind=adafactor reads none"),
        (
            ["precision.state=8bit", "optim.momentum=0.9"],
            r"precision\.state=8bit: 8 bits are for Adam's two moments",
        ),
        (["precision.state=bf16"], r"precision\.state=bf16: .*optim\.momentum=0 keeps no moments"),
        (["engine=deepspeed"], r"engine=deepspeed has only AdamW"),
    ],
)
def test_what_does_not_go_together_is_refused(words: list[str], said: str) -> None:
    base = ["model=tiny", "data.path=x", "train.steps=1", "optim=adafactor"]
    with pytest.raises(UserError, match=rf"(?s){said}"):
        checks.check(compose.compose("train", [*base, *words]))


@pytest.mark.parametrize(
    "layout", ["dp_shard2-zero3", pytest.param("pp2", marks=SLOW), pytest.param("tp2", marks=SLOW)]
)
def test_the_memory_plan_counts_rows_and_columns(layout: str) -> None:
    """To within the vectors, whose squares it leaves out."""
    case = Case(layout, model(), micro_batch_size=1, overrides=OVERRIDES)
    state, held_ = needs(case.config(), layout, case.fields).state, max(run_ranks(2, held, case))
    assert state == pytest.approx(held_, rel=5e-3)
    plain = dataclasses.replace(case, overrides=(("optim.kind", "sgd"), ("optim.momentum", 0.0)))
    assert state - needs(plain.config(), layout, case.fields).state > 0.9 * 4 * 4 * (64 + 96)
