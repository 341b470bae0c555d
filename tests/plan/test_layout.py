"""plan/: degrees, batch plans, the written form, and every refusal with its four parts."""

import dataclasses

import pytest

from hybridtrain.config.schema import BatchConfig, Config, ParallelConfig
from hybridtrain.errors import UserError
from hybridtrain.plan import capabilities, layout, notation, rules, schedules
from hybridtrain.plan.batch import BatchPlan, plan_batch
from hybridtrain.plan.layout import ParallelLayout
from hybridtrain.types import Capabilities, ModelFacts

FACTS = ModelFacts(
    model_type="llama",
    layers=8,
    hidden=64,
    heads=8,
    kv_heads=2,
    head_dim=8,
    ffn=192,
    vocab=512,
    labels=(),
    tied=False,
    window=None,
    max_positions=128,
    parameters=1000,
)
EVERYTHING = Capabilities(
    engine="torch",
    axes=frozenset({"pp", "dp_replicate", "dp_shard", "tp"}),
    zero_stages=frozenset({0, 1, 2, 3}),
    schedules=frozenset(schedules.SCHEDULES),
    precisions=frozenset({"fp32", "bf16_mixed"}),
    pipelined_zero_stages=frozenset({0, 1, 2, 3}),
    sequence_parallel=True,
    hybrid_sharding=True,
    repeated_heads=True,
    shared_modules=True,
    growing_batches=True,
)


def check(
    parallel: ParallelConfig,
    *,
    world_size: int,
    accum: int = 4,
    seq_len: int = 64,
    precision: str = "fp32",
    facts: ModelFacts = FACTS,
) -> None:
    """resolve, plan and check in one go, with `accum` micro-batches of one row per data rank."""
    resolved = layout.resolve(parallel, world_size=world_size)
    plan = plan_batch(
        BatchConfig(global_batch_size=accum * resolved.dp, micro_batch_size=1),
        layout=resolved,
        seq_len=seq_len,
    )
    rules.check(
        parallel, layout=resolved, plan=plan, precision=precision, facts=facts, capabilities=EVERYTHING
    )


def refused(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n  allowed: " in text, text
    assert "\n  try:     " in text, text
    return text


def test_world_size_is_the_product_and_tp_varies_fastest():
    two_of_each = ParallelLayout(dp_replicate=2, dp_shard=2, cp=1, tp=2, pp=2)
    assert two_of_each.world_size == 16
    assert two_of_each.dp == 4
    places = [two_of_each.coordinates(rank) for rank in range(16)]
    assert [place["tp"] for place in places[:4]] == [0, 1, 0, 1]
    assert [place["dp_shard"] for place in places[:4]] == [0, 0, 1, 1]
    assert [place["pp"] for place in places] == [0] * 8 + [1] * 8
    assert len({tuple(place.items()) for place in places}) == 16


@pytest.mark.parametrize(
    ("degrees", "world_size", "expected"),
    [
        ({}, 1, "single"),
        ({}, 4, "dp_replicate4"),
        ({"dp_replicate": 1, "dp_shard": -1}, 4, "dp_shard4"),
        ({"tp": 2}, 8, "dp_replicate4-tp2"),
        ({"tp": 2, "pp": 2, "dp_replicate": 1, "dp_shard": -1}, 8, "pp2-dp_shard2-tp2"),
        ({"dp_replicate": 1, "tp": -1}, 2, "tp2"),
    ],
)
def test_resolve_fills_the_open_axis(degrees, world_size, expected):
    resolved = layout.resolve(ParallelConfig(**degrees), world_size=world_size)
    assert str(resolved) == expected
    assert resolved.world_size == world_size


@pytest.mark.parametrize(
    ("degrees", "world_size", "field"),
    [
        ({"tp": 0}, 2, "parallel.tp=0"),
        ({"pp": -2}, 2, "parallel.pp=-2"),
        ({"dp_shard": -1}, 4, "parallel.dp_shard=-1"),
        ({"tp": 3}, 4, "take a multiple of 3 processes, but 4 were started"),
        ({"dp_replicate": 2, "tp": 2}, 8, "take 4 processes, but 8 were started"),
        ({"dp_replicate": 2, "tp": 2}, 2, "--nproc-per-node 4"),
    ],
)
def test_resolve_refuses_what_does_not_multiply_out(degrees, world_size, field):
    with pytest.raises(UserError) as error:
        layout.resolve(ParallelConfig(**degrees), world_size=world_size)
    assert field in refused(error)


def test_plan_batch_is_one_equation():
    two = ParallelLayout(dp_replicate=2, dp_shard=1, cp=1, tp=2, pp=1)
    plan = plan_batch(BatchConfig(global_batch_size=24, micro_batch_size=3), layout=two, seq_len=128)
    assert plan == BatchPlan(micro_batch_size=3, seq_len=128, grad_accum=4, global_batch_size=24)
    assert plan.tokens == 24 * 128


@pytest.mark.parametrize(
    ("batch", "seq_len", "words"),
    [
        (BatchConfig(10, 4), 8, "batch.global_batch_size=10"),
        (BatchConfig(10, 4), 8, "try:     batch.global_batch_size=8"),
        (BatchConfig(2, 4), 8, "try:     batch.global_batch_size=8"),
        (BatchConfig(0, 4), 8, "batch.global_batch_size=0"),
        (BatchConfig(8, 0), 8, "batch.micro_batch_size=0"),
        (BatchConfig(8, 4), 0, "data.seq_len=0"),
    ],
)
def test_plan_batch_refuses(batch, seq_len, words):
    with pytest.raises(UserError) as error:
        plan_batch(batch, layout=ParallelLayout(2, 1, 1, 1, 1), seq_len=seq_len)
    assert words in refused(error)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 1),
        ({"pp": 2}, 1),
        ({"pp": 2, "schedule": "interleaved_1f1b"}, 2),
        ({"pp": 2, "schedule": "interleaved_1f1b", "virtual_stages": 3}, 3),
        ({"pp": 2, "schedule": "dualpipev"}, 2),
        ({"pp": 1, "schedule": "interleaved_1f1b"}, 1),
    ],
)
def test_stages_per_rank(fields, expected):
    assert schedules.stages_per_rank(ParallelConfig(**fields)) == expected


@pytest.mark.parametrize(
    ("fields", "world_size"),
    [
        ({}, 1),
        ({"dp_replicate": 1, "dp_shard": -1, "zero_stage": 3}, 4),
        # zero1 as such on one process shards nothing and is right
        ({"dp_replicate": 1, "dp_shard": -1, "zero_stage": 1}, 1),
        ({"dp_replicate": 2, "dp_shard": 2, "zero_stage": 2, "tp": 2}, 8),
        ({"tp": 4}, 4),  # 2 key/value heads, each held by two ranks
        ({"pp": 4}, 4),
        ({"pp": 2, "schedule": "gpipe"}, 2),
        ({"pp": 2, "schedule": "interleaved_1f1b"}, 2),
        ({"pp": 2, "schedule": "looped_bfs", "virtual_stages": 4}, 2),
        ({"pp": 2, "schedule": "interleaved_zero_bubble"}, 2),
        ({"pp": 2, "schedule": "zbv_zero_bubble"}, 2),
        ({"pp": 2, "schedule": "dualpipev"}, 2),
        ({"pp": 2, "schedule": "dualpipev", "dp_replicate": 1, "dp_shard": 2, "zero_stage": 1}, 4),
    ],
)
def test_check_accepts(fields, world_size):
    check(ParallelConfig(**fields), world_size=world_size)


REFUSALS = {
    "an axis the engine has not": ({"cp": 2}, {"world_size": 2}, "parallel.cp=2"),
    "no such ZeRO stage": ({"zero_stage": 4}, {"world_size": 1}, "parallel.zero_stage=4"),
    "no such schedule": ({"schedule": "1f2b"}, {"world_size": 1}, "parallel.schedule=1f2b"),
    "no such precision": ({}, {"world_size": 1, "precision": "fp8"}, "precision.kind=fp8"),
    "stage 0 with shards": ({"dp_replicate": 1, "dp_shard": 2}, {"world_size": 2}, "parallel.zero_stage=0"),
    "shards with nobody": ({"zero_stage": 2}, {"world_size": 2}, "parallel.zero_stage=2"),
    "more stages than layers": ({"pp": 16}, {"world_size": 16, "accum": 16}, "the model has 8 layers"),
    "more looped stages than layers": (
        {"pp": 4, "schedule": "interleaved_1f1b", "virtual_stages": 3},
        {"world_size": 4},
        "12 stages (4 ranks x 3 each)",
    ),
    "split backward and ZeRO 3": (
        {"pp": 2, "dp_replicate": 1, "dp_shard": 2, "zero_stage": 3, "schedule": "zbv_zero_bubble"},
        {"world_size": 4},
        "parallel.zero_stage=3",
    ),
    "split backward and ZeRO 2": (
        {"pp": 2, "dp_replicate": 1, "dp_shard": 2, "zero_stage": 2, "schedule": "interleaved_zero_bubble"},
        {"world_size": 4},
        "parallel.zero_stage=2",
    ),
    "two stages per rank in 1f1b": (
        {"pp": 2, "virtual_stages": 2},
        {"world_size": 2},
        "parallel.virtual_stages=2",
    ),
    "three stages per rank in a V": (
        {"pp": 2, "schedule": "dualpipev", "virtual_stages": 3},
        {"world_size": 2},
        "parallel.virtual_stages=3",
    ),
    "one stage per rank in a loop": (
        {"pp": 2, "schedule": "looped_bfs", "virtual_stages": 1},
        {"world_size": 2},
        "parallel.virtual_stages=1",
    ),
    "fewer micro-batches than stages": (
        {"pp": 4},
        {"world_size": 4, "accum": 3},
        "try:     batch.global_batch_size=4",
    ),
    "fewer micro-batches than stages, gpipe": (
        {"pp": 4, "schedule": "gpipe"},
        {"world_size": 4, "accum": 2},
        "wants at least 4, one for each stage",
    ),
    "interleaved wants a multiple": (
        {"pp": 2, "schedule": "interleaved_1f1b"},
        {"world_size": 2, "accum": 3},
        "try:     batch.global_batch_size=4",
    ),
    "zero bubble wants a multiple": (
        {"pp": 2, "schedule": "interleaved_zero_bubble"},
        {"world_size": 2, "accum": 5},
        "a multiple of pp=2",
    ),
    "looped_bfs wants the ranks": (
        {"pp": 4, "schedule": "looped_bfs"},
        {"world_size": 4, "accum": 3},
        "at least 4, one for each pipeline rank",
    ),
    "zbv wants the ranks": (
        {"pp": 4, "schedule": "zbv_zero_bubble"},
        {"world_size": 4, "accum": 3},
        "at least pp=4",
    ),
    "dualpipev wants the stages": (
        {"pp": 2, "schedule": "dualpipev"},
        {"world_size": 2, "accum": 3},
        "at least 4, one for each stage",
    ),
    "heads do not divide": ({"tp": 3}, {"world_size": 3}, "parallel.tp=3"),
    "sequence does not divide": (
        {"tp": 4, "sequence_parallel": "true"},
        {"world_size": 4, "seq_len": 66},
        "try:     data.seq_len=64",
    ),
    "longer than the positions": ({}, {"world_size": 1, "seq_len": 129}, "up to 128"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_check_refuses(case):
    fields, arguments, words = REFUSALS[case]
    parallel = ParallelConfig(**fields)
    before = dataclasses.replace(parallel)
    with pytest.raises(UserError) as error:
        check(parallel, **arguments)
    assert words in refused(error)
    assert parallel == before  # checks never change a value


def test_tp_beyond_kv_heads_needs_whole_copies():
    facts = dataclasses.replace(FACTS, heads=12, kv_heads=4, ffn=192)
    check(ParallelConfig(tp=4), world_size=4, facts=facts)
    with pytest.raises(UserError) as error:
        # 12 heads divide by 6, but 4 key/value heads neither divide nor repeat
        check(ParallelConfig(tp=6), world_size=6, facts=facts)
    text = refused(error)
    assert "allowed: 1, 2, 4, 12" in text
    assert "try:     parallel.tp=4" in text


def test_the_suggested_value_is_accepted():
    """What a refusal tells the user to try holds."""
    with pytest.raises(UserError) as error:
        check(ParallelConfig(pp=2, schedule="dualpipev"), world_size=2, accum=3)
    suggested = int(str(error.value).rpartition("batch.global_batch_size=")[2])
    check(ParallelConfig(pp=2, schedule="dualpipev"), world_size=2, accum=suggested)


@pytest.mark.parametrize(
    "text",
    [
        "single",
        "dp_replicate2",
        "tp2",
        "tp2-nosp",
        "pp2-dp_shard2-tp2-zero3",
        "dp_replicate2-dp_shard2-zero1",
        "pp2-zbv_zero_bubble",
        "pp2-dp_replicate2-interleaved_1f1b-v3",
        "pp3-tp2-cut9.17",
    ],
)
def test_written_form_round_trip(text):
    parallel = ParallelConfig(**notation.parse(text))
    world_size = 1
    for axis in layout.AXES:
        world_size *= getattr(parallel, axis)
    assert notation.write(parallel, layout.resolve(parallel, world_size=world_size)) == text


def test_parse_fills_the_zero_stage_that_sharding_needs():
    assert notation.parse("dp_shard2")["zero_stage"] == 1
    assert notation.parse("tp2")["zero_stage"] == 0


@pytest.mark.parametrize("text", ["tp", "xp2", "pp2-tpp2", "2"])
def test_parse_refuses(text):
    with pytest.raises(UserError) as error:
        notation.parse(text)
    assert f"layout={text}" in refused(error)


@pytest.mark.parametrize(
    ("version", "refused"),
    [
        ("2.11.0+cu130", True),
        ("2.12.1", True),
        ("2.13.0+cpu", False),
        ("2.14.0a0+git12", False),
        ("3.0", False),
        ("unknown", False),
    ],
)
def test_an_older_torch_runs_no_split_backward_passes(monkeypatch, tmp_path, version, refused):
    (tmp_path / f"torch-{version}.dist-info").mkdir()
    (tmp_path / f"torch-{version}.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = capabilities.of_engine("torch")
    assert found.schedules == set(schedules.SCHEDULES) - (set(schedules.SPLIT_BACKWARD) if refused else set())
    assert (version in found.engine) == refused


@pytest.mark.parametrize(("backend", "runs"), [("inductor", False), ("aot_eager", True)])
def test_a_split_backward_does_not_go_through_inductor(backend, runs):
    """Its kernels overwrite what the second part of the backward pass reads: gradients of torch 2.13 are
    wrong by their own size."""
    config = Config()
    config.engine.compile, config.engine.compile_backend = True, backend
    found = capabilities.with_options(config.engine, kind="torch")
    assert "1f1b" in found.schedules
    assert set(schedules.SPLIT_BACKWARD) & found.schedules == (
        set(schedules.SPLIT_BACKWARD) & capabilities.of_engine("torch").schedules if runs else set()
    )
