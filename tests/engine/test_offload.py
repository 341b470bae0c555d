"""engine=torch with optimizer, or also weights and gradients, in the host's memory: bit for bit what it
computes without. On a CPU the copies are made, too; tests/gpu/test_gpu_offload.py has the transfers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from hybridtrain.config import checks, compose
from hybridtrain.errors import UserError
from hybridtrain.models.init import local_slices
from hybridtrain.optim.shards import HostCopy, local, on_cpu
from hybridtrain.parallel.mesh import connect
from tests.cases import Case, model, reference, start, train
from tests.engine.test_state import both
from tests.ranks import run_ranks

SLOW = pytest.mark.slow
OPTIMIZER: tuple[tuple[str, Any], ...] = (("engine.offload_optimizer", "cpu"),)
ALL: tuple[tuple[str, Any], ...] = (*OPTIMIZER, ("engine.offload_parameters", "cpu"))
PLACES = {"optimizer": OPTIMIZER, "all": ALL}


def equal(ours: Any, theirs: Any) -> None:
    assert ours.losses == theirs.losses
    assert ours.grad_norms == theirs.grad_norms
    names = ours.parameters.keys()
    assert [name for name in names if not torch.equal(ours.parameters[name], theirs.parameters[name])] == []


@pytest.mark.parametrize(
    ("place", "layout", "precision", "overrides"),
    [
        ("optimizer", "single", "bf16_mixed", (("optim.ema", 0.9),)),
        ("all", "single", "fp32", ()),
        ("all", "dp_shard2-zero3", "fp16_mixed", (("precision.init_scale", 2.0**16),)),
        *(
            pytest.param(place, layout, precision, overrides, marks=SLOW)
            for place, layout, precision, overrides in (
                ("optimizer", "dp_shard2-zero1", "fp32", ()),
                ("optimizer", "pp2-tp2", "fp32", (("optim.kind", "lion"),)),
                ("optimizer", "single", "bf16_pure", (("precision.rounding", "kahan"),)),
                ("optimizer", "single", "bf16_mixed", (("precision.state", "bf16"),)),
                ("all", "dp_replicate2", "fp32", (("optim.kind", "sgd"),)),
                ("all", "dp_replicate2-dp_shard2-zero3", "bf16_mixed", (("recompute.kind", "full"),)),
                ("all", "single", "bf16_pure", (("precision.rounding", "stochastic"),)),
                ("all", "single", "fp16_mixed", (("optim.ema", 0.9),)),
            )
        ),
    ],
)
def test_nothing_else_is_computed(
    place: str, layout: str, precision: str, overrides: tuple[tuple[str, Any], ...]
) -> None:
    """Losses, norms, clipped updates of tied weights over accumulated micro-batches, skipped steps. Replicas,
    which reduce each micro-batch where weights are offloaded, have one.
    """
    fields, rows = model(tie_word_embeddings=True), 4 if layout == "dp_replicate2" else 2
    plain = Case(
        layout, fields, precision=precision, steps=4, micro_batch_size=rows, lr=1e-2, overrides=overrides
    )
    ours = dataclasses.replace(plain, overrides=(*overrides, *PLACES[place]))
    for with_, without in zip(
        run_ranks(ours.world_size, train, ours), run_ranks(plain.world_size, train, plain), strict=True
    ):
        equal(with_, without)
    if precision == "fp32":
        assert with_.losses == pytest.approx(reference(plain).losses, rel=1e-5)


def places(case: Case) -> tuple[set[str], int, bool]:
    """Kinds of shards; parameters that fully_shard offloads; whether copies are equal after a step."""
    engine = start(case)
    engine.train_step(case.batches(0, dp_rank=0, dp=1), lr=case.lr)
    items = engine.optimizer.shards
    same = all(torch.equal(local(item.parameter), item.shard) for item in items)
    apart = {
        type(item).__name__
        for item in items
        if local(item.parameter).data_ptr() != item.shard.data_ptr() or not isinstance(item, HostCopy)
    }
    groups = [group for stage in engine.stages for group in groups_of_stage(stage)]
    return apart, sum(parameter.offload_to_cpu for group in groups for parameter in group.fsdp_params), same


def groups_of_stage(stage: Any) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule, fully_shard

    from hybridtrain.parallel.fsdp import groups_of

    return groups_of(
        fully_shard.state(module) for module in stage.modules() if isinstance(module, FSDPModule)
    )


def test_it_is_in_force() -> None:
    case = Case("single", overrides=OPTIMIZER)
    assert run_ranks(1, places, case) == [({"HostCopy"}, 0, True)]
    ((kinds, offloaded, same),) = run_ranks(1, places, dataclasses.replace(case, overrides=ALL))
    assert (kinds, same) == ({"LocalShard"}, True)
    assert offloaded == len(reference(Case("single", steps=0)).parameters)


def twin() -> bool:
    """Whether a mesh for the host's memory has the ranks and groups of its model."""
    connect(torch.device("cpu"), timeout_s=60)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp_shard", "tp"))
    other, placements = on_cpu(mesh), [Shard(0), Shard(1)]
    first, second = (
        DTensor.from_local(torch.zeros(3, 2), each, placements, run_check=False) for each in (mesh, other)
    )
    same = other.get_group("tp") is mesh.get_group("tp") and local_slices(first) == local_slices(second)
    return same and other is not mesh


def test_states_in_the_hosts_memory_have_a_mesh_of_the_same_ranks() -> None:
    """For a parameter on a GPU, whose mesh would copy them there."""
    assert run_ranks(2, twin) == [True, True]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((*ALL, ("optim.ema", 0.9)), (*OPTIMIZER, ("optim.ema", 0.9))),
        pytest.param(OPTIMIZER, ALL, marks=SLOW),
        pytest.param((), ALL, marks=SLOW),
        pytest.param(ALL, (), marks=SLOW),
    ],
)
def test_a_checkpoint_goes_on_elsewhere(
    before: tuple[tuple[str, Any], ...], after: tuple[tuple[str, Any], ...], tmp_path: Path
) -> None:
    fields = model(tie_word_embeddings=True)
    saved, loaded = (Case("single", fields, steps=4, overrides=each) for each in (before, after))
    losses, resumed = both(saved, loaded, tmp_path / "checkpoint")
    assert resumed == losses


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["engine.offload_parameters=cpu"],
            r"engine\.offload_parameters=cpu: .*optimizer's state is there too",
        ),
        (
            ["engine.offload_optimizer=cpu", "optim=muon"],
            r"engine\.offload_optimizer=cpu: optim\.kind=muon exchanges",
        ),
        (
            ["engine.offload_optimizer=cpu", "engine.offload_parameters=cpu", "precision.monitor_every=5"],
            r"precision\.monitor_every=5: .*they are offloaded",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=rf"(?s){said}"):
        checks.check(compose.compose("train", ["model=tiny", "data.path=x", "train.steps=1", *words]))


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("tp2", r"parallel\.tp=2: .*engine\.offload_parameters=cpu does not run this axis"),
        ("pp2", r"parallel\.pp=2: .*engine\.offload_parameters=cpu does not run this axis"),
        ("dp_shard2-zero1", r"parallel\.zero_stage=1: .*engine\.offload_parameters=cpu does not run it"),
    ],
)
def test_layouts_that_it_does_not_run_are_refused(layout: str, said: str) -> None:
    from hybridtrain import engine as engines

    with pytest.raises(UserError, match=said):
        engines.settle(Case(layout, overrides=ALL).config(), world_size=2)
