"""Every layout trains the same tokens to the same losses, gradient norms, gradients and
parameters as one plain process.

fp32, three steps, gradient accumulation, clipping and a different number of valid tokens in every row, unless
a case says otherwise.
"""

import itertools
import shutil

import pytest

from tests.cases import Case, assert_parity, model

SCHEDULES = (
    "gpipe",
    "1f1b",
    "interleaved_1f1b",
    "looped_bfs",
    "interleaved_zero_bubble",
    "zbv_zero_bubble",
    "dualpipev",
)
FAMILIES = ("mistral", "qwen2", "qwen3")
"""Besides llama, which all other tests train."""
SLOW = pytest.mark.slow
SYNCING = ("1f1b", "gpipe", "interleaved_1f1b", "looped_bfs")
"""The schedules that run with ZeRO 2 and 3: their backward is not split."""


@pytest.mark.parametrize(
    "layout",
    [
        "single",
        "tp2",
        pytest.param("tp4", marks=SLOW),  # by default with fewer key/value heads than ranks
        "tp2-nosp",
        "pp2",
        "pp4",
        "dp_replicate2",
        "dp_shard2-zero1",
        "dp_shard2-zero2",
        "dp_shard2-zero3",
    ],
)
def test_each_axis(layout):
    assert_parity(Case(layout))


@pytest.mark.parametrize(
    "layout",
    [
        "pp2-tp2",
        pytest.param("pp2-tp2-nosp", marks=SLOW),
        "pp2-dp_replicate2",
        "pp2-dp_shard2",
        "dp_replicate2-tp2",
        "dp_replicate2-dp_shard2-zero1",
        "dp_replicate2-dp_shard2-zero2",
        "dp_replicate2-dp_shard2-zero3",
        "dp_shard2-tp2-zero1",
        pytest.param("dp_shard2-tp2-zero2", marks=SLOW),
        "dp_shard2-tp2-zero3",
        pytest.param("dp_shard2-tp2-zero3-nosp", marks=SLOW),
    ],
)
def test_each_pair_of_axes(layout):
    assert_parity(Case(layout))


def test_three_axes():
    assert_parity(Case("pp2-dp_shard2-tp2"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        "dp_shard4-zero3",
        "dp_shard8-zero1",
        "dp_replicate2-dp_shard2-tp2-zero1",
        "dp_replicate2-dp_shard2-tp2-zero3",
        "pp2-dp_replicate2-tp2",
        "pp2-dp_replicate2-dp_shard2",
        "pp2-dp_shard2-tp2-nosp",
        "pp2-dp_shard2-tp2-zero2",
        "pp2-dp_shard2-tp2-zero3",
        "pp2-dp_shard2-tp2-zero3-interleaved_1f1b",
        "pp2-dp_shard2-tp2-zbv_zero_bubble",
        "pp2-dp_shard2-tp2-dualpipev",
        "pp2-tp4",
        "pp4-tp2",
        "pp4-dp_shard2",
        "pp2-dp_replicate2-dp_shard2-tp2",
    ],
)
def test_more_products_of_axes(layout):
    assert_parity(Case(layout, micro_batch_size=1, global_batch_size=16))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("layout", ["pp2", pytest.param("pp2-dp_shard2", marks=SLOW)])
def test_every_schedule(layout, schedule):
    assert_parity(Case(f"{layout}-{schedule}", micro_batch_size=1))


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble"])
def test_three_virtual_stages_of_uneven_size(schedule):
    assert_parity(Case(f"pp2-{schedule}-v3", model(num_hidden_layers=7), micro_batch_size=1))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_on_four_pipeline_ranks(schedule, tied):
    assert_parity(
        Case(f"pp4-{schedule}", model(num_hidden_layers=9, tie_word_embeddings=tied), micro_batch_size=1)
    )


@pytest.mark.parametrize(
    ("zero", "schedule"),
    [
        (2, "1f1b"),
        (2, "interleaved_1f1b"),
        *((3, schedule) for schedule in SYNCING),
        pytest.param(2, "gpipe", marks=SLOW),
        pytest.param(2, "looped_bfs", marks=SLOW),
    ],
)
def test_zero_2_and_3_in_a_pipeline(zero, schedule):
    assert_parity(Case(f"pp2-dp_shard2-zero{zero}-{schedule}", micro_batch_size=1))


@pytest.mark.parametrize("layers", [3, 5])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_layers_that_do_not_divide_by_the_stages(layers, schedule):
    assert_parity(Case(f"pp2-{schedule}", model(num_hidden_layers=layers), micro_batch_size=1))


@pytest.mark.parametrize("layout", ["pp2-cut1", "pp2-zbv_zero_bubble"])
def test_stages_cut_by_weight_or_where_the_user_wants(layout):
    """The head weighs as much as two layers of six."""
    assert_parity(Case(layout, model(num_hidden_layers=6, vocab_size=1024), micro_batch_size=1))


@pytest.mark.parametrize(
    "layout",
    [
        "single",
        "pp2",
        "pp4",
        "pp2-zbv_zero_bubble",
        "pp2-interleaved_1f1b",
        # by default with an odd vocabulary, or with the other V schedule
        *(pytest.param(name, marks=SLOW) for name in ("tp2", "dp_shard2-zero3", "dp_shard2-tp2-zero3")),
        pytest.param("pp2-dualpipev", marks=SLOW),
        "pp2-dp_shard2-zero3",
        "pp2-dp_shard2-tp2",
    ],
)
def test_tied_weights(layout):
    assert_parity(Case(layout, model(tie_word_embeddings=True)))


@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        ("tp4", model("llama", num_key_value_heads=2, attention_bias=True, mlp_bias=True)),
        ("tp2", model("qwen3", num_key_value_heads=1, attention_bias=True)),
        pytest.param("tp2-nosp", model("qwen2", num_key_value_heads=1), marks=SLOW),
        pytest.param("dp_shard2-tp2-zero3", model("qwen3", num_key_value_heads=1), marks=SLOW),
        pytest.param("pp2-tp2", model("mistral", num_key_value_heads=1), marks=SLOW),
        pytest.param("tp4", model("qwen3", num_key_value_heads=2), marks=SLOW),
        pytest.param("tp4-nosp", model("llama", num_key_value_heads=1), marks=SLOW),
        pytest.param("tp8", model("llama", num_key_value_heads=2), marks=SLOW),
    ],
)
def test_fewer_key_value_heads_than_tensor_ranks(layout, fields):
    assert_parity(Case(layout, fields))


@pytest.mark.parametrize(
    ("layout", "tied"),
    [
        ("tp2", False),
        ("tp2", True),
        ("dp_shard2-zero3", True),
        ("dp_shard2-tp2-zero3", True),
        *(
            pytest.param(name, False, marks=SLOW)
            for name in ("tp4", "dp_shard2-zero3", "dp_shard2-tp2-zero3")
        ),
        pytest.param("tp4", True, marks=SLOW),
    ],
)
def test_odd_vocabulary(layout, tied):
    assert_parity(Case(layout, model(vocab_size=257, tie_word_embeddings=tied)))


@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        ("tp2", model(hidden_size=72, num_attention_heads=6, num_key_value_heads=2, intermediate_size=90)),
        (
            "dp_shard4-zero3",
            model(
                hidden_size=30,
                num_attention_heads=5,
                num_key_value_heads=1,
                intermediate_size=45,
                vocab_size=257,
            ),
        ),
        pytest.param(
            "dp_shard4-zero1",
            model(
                hidden_size=30,
                num_attention_heads=5,
                num_key_value_heads=1,
                intermediate_size=45,
                vocab_size=257,
            ),
            marks=SLOW,
        ),
        # q_norm has two numbers for four ranks: two of them hold an empty shard. The larger eps: a norm over
        # two numbers magnifies rounding
        ("dp_shard4-zero3", model("qwen3", head_dim=2, rms_norm_eps=1e-1)),
        (
            "dp_shard2-tp2-zero3",
            model(
                hidden_size=30,
                num_attention_heads=10,
                num_key_value_heads=2,
                head_dim=6,
                intermediate_size=50,
            ),
        ),
    ],
)
def test_sizes_that_do_not_divide_by_the_ranks(layout, fields):
    assert_parity(Case(layout, fields))


@pytest.mark.parametrize(
    "layout",
    ["tp2", *(pytest.param(layout, marks=SLOW) for layout in ("pp2", "dp_shard2-zero3"))],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, layout):
    assert_parity(Case(layout, model(family)))


@pytest.mark.parametrize(
    "family", ["qwen3", *(pytest.param(family, marks=SLOW) for family in ("mistral", "qwen2"))]
)
def test_every_family_on_three_axes(family):
    assert_parity(Case("pp2-dp_shard2-tp2", model(family)))


@pytest.mark.parametrize(
    "layout", ["single", "tp2", "tp2-nosp", "pp2", pytest.param("dp_shard2-tp2-zero3", marks=SLOW)]
)
def test_biases(layout):
    assert_parity(Case(layout, model(attention_bias=True, mlp_bias=True)))


@pytest.mark.parametrize("layout", ["tp2", "pp2", pytest.param("pp2-tp2", marks=SLOW)])
def test_sliding_windows(layout):
    window = {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 2}
    assert_parity(Case(layout, model("qwen2", **window)))


@pytest.mark.parametrize("layout", ["tp2", pytest.param("pp2-dp_shard2", marks=SLOW)])
def test_eager_attention(layout):
    assert_parity(Case(layout, overrides=(("model.attention", "eager"),)))


@pytest.mark.parametrize(
    ("layout", "batch", "micro"),
    [
        ("single", 1, 1),
        ("single", 8, 8),
        ("tp2", 2, 2),
        ("pp2", 8, 2),
        ("dp_shard2-zero3", 2, 1),
        ("dp_shard2-zero2", 4, 2),
        pytest.param("dp_shard2-tp2-zero3", 4, 2, marks=SLOW),
        ("pp2-dp_shard2-zero3", 8, 2),
        ("pp2-dp_shard2-zbv_zero_bubble", 8, 2),
    ],
)
def test_sizes_of_batches(layout, batch, micro):
    assert_parity(Case(layout, global_batch_size=batch, micro_batch_size=micro))


@pytest.mark.parametrize(
    "layout",
    ["dp_shard2-zero1", pytest.param("dp_shard2-tp2-zero3", marks=SLOW), "dp_replicate2", "pp2-dp_shard2"],
)
def test_a_data_rank_without_any_valid_token(layout):
    assert_parity(Case(layout, blank_rows=(4, 5, 6, 7)))


def test_a_pipeline_micro_batch_without_any_valid_token():
    assert_parity(Case("pp2-zbv_zero_bubble", blank_rows=(0, 5)))


@pytest.mark.parametrize("layout", ["tp2-nosp", "pp2", "dp_shard2-zero3"])
def test_an_odd_number_of_positions(layout):
    assert_parity(Case(layout, seq_len=63))


@pytest.mark.parametrize("clip", [0.0, 0.01, 1e6])
def test_clipping(clip):
    assert_parity(Case("pp2-dp_shard2", overrides=(("optim.clip", clip),)))


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        *itertools.product(
            ("single", "tp2", "pp2", "pp2-dp_shard2-zero3", "pp2-zbv_zero_bubble"), ("selective", "full")
        ),
        ("dp_shard2-tp2-zero3", "full"),
        pytest.param("dp_shard2-tp2-zero3", "selective", marks=SLOW),
    ],
)
def test_recomputation(layout, kind):
    assert_parity(Case(layout, overrides=(("recompute.kind", kind),)))


@pytest.mark.parametrize(
    "layout", ["tp2", "pp2", *(pytest.param(name, marks=SLOW) for name in ("single", "dp_shard2-tp2-zero3"))]
)
def test_compilation(layout):
    assert_parity(Case(layout, overrides=(("engine.compile", True), ("engine.compile_backend", "aot_eager"))))


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_compilation_with_recomputation(kind):
    overrides = (("engine.compile", True), ("engine.compile_backend", "aot_eager"), ("recompute.kind", kind))
    assert_parity(Case("single", overrides=overrides))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ on the CPU: install g++")
@pytest.mark.parametrize("layout", ["single", "tp2", "dp_shard2-tp2-zero3", "pp2"])
def test_compilation_with_inductor(layout):
    assert_parity(Case(layout, overrides=(("engine.compile", True), ("engine.compile_backend", "inductor"))))
