"""What a step costs besides arithmetic: nothing that waits for the device, so many collectives; what
recomputation repeats; what schedules hold."""

import itertools
import shutil
from collections import Counter
from typing import Any

import pytest
import torch

from tests.cases import Case, model, start
from tests.dispatch import Alive, Collectives, NoWait, Products
from tests.ranks import run_ranks
from tests.runs import arguments, on_this_rank

COMPILED = (("engine.compile", True), ("engine.compile_backend", "inductor"))
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="inductor compiles C++ on the CPU: install g++"
)


def step(engine: Any, case: Case, number: int) -> Any:
    return engine.train_step(
        case.batches(number, dp_rank=engine.mesh.dp_rank, dp=engine.layout.dp), lr=case.lr
    )


def watched_step(case: Case) -> Counter[str]:
    engine = start(case)
    step(engine, case, 0)
    batches = case.batches(1, dp_rank=engine.mesh.dp_rank, dp=engine.layout.dp)
    with NoWait() as watch:
        engine.train_step(batches, lr=case.lr)
    return watch.collectives


COLLECTIVES = {
    "single": {},  # in the other layouts tokens, loss, and norms, one for each axis that is cut
    "pp2": {"allreduce": 3, "send": 4, "recv": 4},
    "dp_replicate2": {"allreduce": 7},  # a gradient for each of four layers and the rest
    "dp_shard2-zero1": {"allreduce": 3, "_allgather_base": 5, "alltoall_base": 5},
    "dp_shard2-zero2": {"allreduce": 3, "_allgather_base": 5, "alltoall_base": 10},  # two micro-batches
    "dp_shard2-zero3": {"allreduce": 3, "_allgather_base": 18, "alltoall_base": 10},
    # two micro-batches of 4 layers: 4 sums a layer; the embedding, the loss, and once a step the gradients of
    # norms, of which each rank has a part, and whether loss and norm are finite on all ranks. A sum over
    # positions is an all-to-all on gloo.
    "tp2": {"allreduce": 4, "all_reduce": 8, "all_to_all_single": 68, "all_gather_into_tensor": 76},
    "tp2-nosp": {"allreduce": 3, "all_reduce": 76, "all_gather_into_tensor": 4},
}


@pytest.mark.parametrize("layout", COLLECTIVES)
def test_a_step_never_waits_for_the_device(layout):
    """And it has these collectives at most, on every rank."""
    case = Case(layout)
    for found in run_ranks(case.world_size, watched_step, case):
        found.pop("_wrap_tensor_autograd", None)
        assert {
            name: count for name, count in found.items() if count > COLLECTIVES[layout].get(name, 0)
        } == {}, found


def test_a_step_with_a_loss_scale_never_waits_either():
    assert run_ranks(1, watched_step, Case(precision="fp16_mixed")) == [{}]


def collectives_of_a_run(argv: list[str]) -> Counter[str]:
    with Collectives() as watch:
        ended = on_this_rank(argv)
    assert ended.code == 0, ended.err
    return watch.collectives


@pytest.mark.parametrize(
    ("world_size", "layout", "expected"),
    [(1, "single", 0), (2, "pp2", 3), pytest.param(2, "zero3", 3, marks=pytest.mark.slow)],
)
def test_training_adds_no_collective_to_those_of_the_engine(world_size, layout, expected, data, tmp_path):
    """Neither to agree on stopping nor to see that a checkpoint is complete: the ranks' flags are
    counted with the tokens."""
    runs = []
    for steps in (4, 8):
        options = {"train__steps": steps, "train__log_every": 100, "checkpoint__every": 2, "parallel": layout}
        runs.append(
            run_ranks(world_size, collectives_of_a_run, arguments(tmp_path / str(steps), data, **options))
        )
    for shorter, longer in zip(*runs, strict=True):
        added = {
            name: (longer[name] - shorter[name]) / 4
            for name in ("allreduce", "gather", "broadcast", "allgather", "barrier")
        }
        # tokens, norm, loss
        assert added == {"allreduce": expected, "gather": 0, "broadcast": 0, "allgather": 0, "barrier": 0}


def refused(name: str) -> None:
    values, chosen = torch.arange(4.0), torch.tensor([True, False, True, False])
    calls = {
        "item": lambda: values.sum().item(),
        "truth": lambda: bool(values.sum() > 1),
        "list": lambda: values[[1, 3]],
        "assigned list": lambda: values.__setitem__([1, 3], 0.0),
        "mask": lambda: values[chosen],
        "nonzero": lambda: chosen.nonzero(),
        "new": lambda: torch.tensor([1.0, 2.0]),
    }
    with NoWait():
        calls[name]()


@pytest.mark.parametrize("name", ["item", "truth", "list", "assigned list", "mask", "nonzero", "new"])
def test_the_watch_refuses_what_waits(name):
    with pytest.raises(AssertionError, match="waits for the device"):
        refused(name)


def products(case: Case) -> int:
    """Matrix products of a step, once everything is compiled."""
    engine = start(case)
    step(engine, case, 0)
    with Products() as watch:
        step(engine, case, 1)
    return watch.count


@pytest.mark.parametrize(
    ("layout", "compiled"),
    [
        ("single", ()),
        pytest.param("single", COMPILED, marks=[needs_compiler, pytest.mark.slow]),
        pytest.param("tp2", COMPILED, marks=[needs_compiler, pytest.mark.slow]),
        pytest.param("pp2", COMPILED, marks=[needs_compiler, pytest.mark.slow]),
    ],
)
def test_selective_recomputation_repeats_no_product(layout, compiled):
    """Of a layer's seven products and its attention, full repeats at least one per layer and
    micro-batch, selective none."""
    counts = {}
    for kind in ("none", "selective", "full"):
        case = Case(layout, model(num_hidden_layers=2), overrides=(*compiled, ("recompute.kind", kind)))
        counts[kind] = sum(run_ranks(case.world_size, products, case))
    assert counts["selective"] == counts["none"], counts
    assert counts["full"] >= counts["none"] + 2 * 4, counts


def timeouts(case: Case) -> list[tuple[str, int, float]]:
    """(name, ranks, seconds) of every process group there is, once a step has been done."""
    step(start(case), case, 0)
    groups = torch.distributed.distributed_c10d._world.pg_map
    return sorted(
        (
            group.group_desc,
            group.size(),
            group._get_backend(torch.device("cpu")).options._timeout.total_seconds(),
        )
        for group in groups
    )


WORLD = "default_pg"
GROUPS = {
    "single": {WORLD: 1},
    "single-bf16_mixed": {WORLD: 1},
    "tp2": {WORLD: 2, "checkpoint": 2, "dp_shard": 1},  # dp_shard: fully_shard wants one
    "pp2": {WORLD: 2, "checkpoint": 2},
    "dp_replicate2": {WORLD: 2, "checkpoint": 2, "dp_shard": 1},
    "dp_shard2-zero3": {WORLD: 2, "checkpoint": 2},
    "dp_replicate2-dp_shard2-zero2": {WORLD: 4, "checkpoint": 4, "dp_replicate": 2, "dp_shard": 2},
    "pp2-tp2": {WORLD: 4, "checkpoint": 4, "pp": 2, "tp": 2, "dp_shard": 1},
    "pp4": {WORLD: 4, "checkpoint": 4, "embedding": 2},
}


@pytest.mark.parametrize("layout", GROUPS)
def test_every_group_has_a_purpose_a_name_and_the_timeout_that_was_asked_for(layout):
    """Where an axis or a product has all ranks, their first group serves; the two ends of a pipeline
    add up tied weights."""
    name, _, precision = layout.partition("-bf16")
    case = Case(
        name,
        model(tie_word_embeddings=True),
        precision=f"bf16{precision}" if precision else "fp32",
        overrides=(("engine.timeout_s", 120),),
    )
    ranks = run_ranks(case.world_size, timeouts, case)
    expected = [(desc, size, 120.0) for desc, size in sorted(GROUPS[layout].items())]
    inner = [row for row in expected if row[0] != "embedding"]
    assert ranks == [
        expected if rank in (0, case.world_size - 1) else inner for rank in range(case.world_size)
    ]


VOCABULARY, HIDDEN = 8192, 64


def peak_of_a_step(case: Case) -> int:
    """Bytes at the peak of the second step above what was there before it, on the rank of the last stage."""
    engine = start(case)
    step(engine, case, 0)
    with Alive() as watch:
        step(engine, case, 1)
    return watch.peak


@pytest.mark.parametrize(
    ("schedule", "precision"),
    [
        ("gpipe", "fp32"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product(
                ["looped_bfs", "interleaved_zero_bubble", "1f1b"], ["fp32", "bf16_mixed"]
            )
        ),
        pytest.param("gpipe", "bf16_mixed", marks=pytest.mark.slow),
    ],
)
def test_one_gradient_of_the_head_whatever_is_in_flight(schedule, precision):
    """Each micro-batch in flight adds its activations, not another matrix of the head's size."""
    peaks = []
    for micro_batches in (4, 8):
        fields = model(vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=64)
        case = Case(
            f"pp2-{schedule}",
            fields,
            precision=precision,
            global_batch_size=micro_batches,
            micro_batch_size=1,
            steps=2,
        )
        peaks.append(max(run_ranks(case.world_size, peak_of_a_step, case)))
    grown = (peaks[1] - peaks[0]) / 4
    assert grown < 0.25 * 4 * VOCABULARY * HIDDEN, (peaks, grown)
