"""What ranks must agree on, and sums that have to be fp32 under every layout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hybridtrain.parallel.grad_norm import agreed
from hybridtrain.plan.formats import FORMATS
from hybridtrain.precision.qlinear import Product, product
from hybridtrain.runtime.collectives import GroupRanks
from tests.cases import Case, deepspeed, start
from tests.ranks import RankFailed, run_ranks

MANY = 128


def batches_of(engine: Any, case: Case) -> list[Any]:
    return case.batches(0, dp_rank=engine.mesh.dp_rank, dp=engine.layout.dp)


def with_a_fault(case: Case, where: str) -> tuple[float, float, float]:
    """A step in which numbers of the last rank alone are not finite: (loss, gradient norm, skipped)."""
    engine = start(case)
    if dist.get_rank() == dist.get_world_size() - 1 and where == "loss":
        (head,) = engine._heads() if case.config().engine.kind == "torch" else [engine.stage.part("lm_head")]
        head.register_forward_hook(lambda *call: call[2] * math.nan)
    elif dist.get_rank() == dist.get_world_size() - 1:
        named = dict(engine.stages[-1].named_parameters())
        weight = next(weight for name, weight in named.items() if "input_layernorm" in name)
        weight.register_hook(lambda gradient: gradient * math.inf)
    result = engine.train_step(batches_of(engine, case), lr=case.lr)
    return float(result.loss), float(result.grad_norm), float(result.skipped)


WHOLE = (("parallel.sequence_parallel", False),)


@pytest.mark.parametrize(
    ("case", "where"),
    [
        (Case("tp2", overrides=WHOLE), "gradient"),
        pytest.param(Case("tp2"), "loss", marks=pytest.mark.slow),
        pytest.param(Case("pp2-tp2", overrides=WHOLE), "gradient", marks=pytest.mark.slow),
        pytest.param(deepspeed("tp2", precision="bf16_mixed"), "loss", marks=pytest.mark.slow),
    ],
)
def test_a_fault_of_one_tensor_parallel_rank_is_seen_by_all(case: Case, where: str) -> None:
    """They compute the same, and would go different ways after a bit that the hardware turned over."""
    found = run_ranks(case.world_size, with_a_fault, case, where)
    for loss, norm, skipped in found:
        assert math.isfinite(loss) == (where == "gradient")
        assert case.config().engine.kind == "deepspeed" or (not math.isfinite(norm) and skipped == 1)


def numbers_of(case: Case) -> list[float]:
    engine = start(case)
    rank = dist.get_rank()
    return agreed(torch.tensor([1.5, math.nan if rank else 2.0, math.inf]), mesh=engine.mesh).tolist()


def test_finite_numbers_stay_what_they_are() -> None:
    for fine, bad, infinite in run_ranks(2, numbers_of, Case("tp2")):
        assert (fine, math.isnan(bad), infinite) == (1.5, True, math.inf)


def product_of(name: str, faulty: int) -> bool:
    """Whether anything is finite in a row with a NaN, of a product that is cut over its inputs."""
    dist.init_process_group("gloo") if not dist.is_initialized() else None
    group = dist.group.WORLD
    assert group is not None
    x, w = torch.ones(4, 32), torch.ones(8, 32)
    x[1, 3] = math.nan if dist.get_rank() == faulty else 1.0
    y = product(x, w, Product(FORMATS[name], "K", GroupRanks(group), native=False))
    return bool(y[1].isfinite().any())


@pytest.mark.parametrize(
    ("name", "faulty"),
    [
        ("int8", 1),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("int8", 0), ("fp8_rowwise", 1))),
    ],
)
def test_nan_of_any_rank_stays(name: str, faulty: int) -> None:
    """The maximum of gloo, which finds the scale, leaves out a NaN that is not the first rank's."""
    assert not run_ranks(2, product_of, name, faulty)[faulty]


def norms(case: Case) -> list[float]:
    """Of a micro-batch, and of the same many times: their mean."""
    engine = start(case)
    batch = batches_of(engine, case)[0]
    return [float(engine.train_step([batch] * count, lr=0.0).grad_norm) for count in (1, MANY)]


@pytest.mark.parametrize(
    "layout", ["dp_shard2-zero2", pytest.param("dp_shard2-zero3", marks=pytest.mark.slow)]
)
def test_micro_batches_add_up_in_fp32_in_bf16_pure(layout: str) -> None:
    """In bf16, a sum of 128 times the same is 2 % too small."""
    one, many = run_ranks(2, norms, Case(layout, precision="bf16_pure"))[0]
    assert many == pytest.approx(one, rel=2e-3)


def test_all_rungs_of_a_ladder_fit_before_the_first_step() -> None:
    """Key and value projections have 16 outputs, 8 on a rank: no block of 32."""
    ladder = ["int8", "mxfp8"]
    overrides = (
        ("precision.compute", ladder[0]),
        ("precision.adaptive", True),
        ("precision.ladder", ladder),
        ("precision.monitor_every", 1),
    )
    with pytest.raises(RankFailed, match=r"precision\.compute=mxfp8: .*no multiple of 32"):
        run_ranks(2, norms, Case("tp2", overrides=overrides))
