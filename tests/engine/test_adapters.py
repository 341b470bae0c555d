"""Adapters: every layout trains them as one plain process, checkpoints hold them alone, memory is counted."""

import dataclasses
from pathlib import Path
from unittest import mock

import pytest

from hybridtrain import engine as engines
from hybridtrain.models import adapters
from hybridtrain.plan import flops, memory
from hybridtrain.types import Progress
from tests.cases import GPT2, Case, Outcome, assert_parity, model, reference, start, train
from tests.engine.test_state import both
from tests.families.copies import fields_of
from tests.plan.test_memory import held
from tests.ranks import run_ranks

SLOW = pytest.mark.slow
LORA = (("adapters.kind", "lora"), ("adapters.rank", 4))
FP8 = (("precision.compute", "fp8_tensorwise"),)


def lora(layout: str, fields: dict | None = None, *, more: tuple = (), **options) -> Case:
    """B begins at zero: with a small rate, later steps would say nothing about A."""
    options = {"steps": 3, "lr": 1e-2, **options}
    return Case(layout, fields or model(), overrides=(*LORA, *more), **options)


@pytest.mark.parametrize(
    ("model_type", "layout"),
    [
        ("llama", "dp_shard2-zero3"),
        ("llama", "tp2"),
        ("llama", "pp2"),
        *(
            pytest.param(model_type, layout, marks=SLOW)
            for model_type in ("llama", "gpt2", "gemma2")
            for layout in ("dp_replicate2", "dp_shard2-zero3", "tp2", "pp2", "pp2-tp2")
        ),
        *(
            pytest.param("llama", layout, marks=SLOW)
            for layout in ("tp2-nosp", "tp4", "pp2-zbv_zero_bubble", "pp2-dp_shard2-zero1")
        ),
        *(pytest.param(kind, "tp2", marks=SLOW) for kind in ("phi3", "mixtral", "deepseek_v3")),
    ],
)
def test_layouts_equal_the_plain_process(model_type, layout):
    fields = model() if model_type == "llama" else fields_of(model_type)
    if layout == "tp4":  # fewer key/value heads than ranks
        fields["num_key_value_heads"] = 2
    assert_parity(lora(layout, fields))


@pytest.mark.parametrize(
    ("fields", "layout", "kind"),
    [
        (model(), "tp2", "full"),
        *(
            pytest.param(fields, layout, kind, marks=SLOW)
            for fields, layout, kind in (
                (model(), "pp2-dp_shard2-zero3", "selective"),
                (model(), "tp2-nosp", "none"),
                (GPT2, "pp2-tp2", "full"),  # with dropout of its own
            )
        ),
    ],
)
def test_dropout_on_the_input_of_adapters(fields, layout, kind):
    """Of a part of the channels, too, where inputs are cut, and in recomputed layers."""
    options = (("adapters.dropout", 0.2), ("recompute.kind", kind), ("model.attention", "eager"))
    with_it = lora(layout, fields, more=options, steps=2)
    assert_parity(with_it)
    without = lora(layout, fields, more=options[1:], steps=1)
    ours, other = (reference(case).gradients for case in (with_it, without))
    names = [name for name in ours if "lora_B" in name]
    assert all((ours[name] - other[name]).norm() > 0.1 * other[name].norm() for name in names)


@pytest.mark.slow
def test_a_stage_may_have_nothing_to_train():
    assert_parity(lora("pp2", more=(("adapters.match", ["model.layers.3.mlp.*"]),)))


def without_sums(case: Case) -> Outcome:
    """Trains with parts of gradients that are not added up."""
    whole = adapters.sliced

    def faulty(slicing, settings, *, config):
        return dataclasses.replace(whole(slicing, settings, config=config), partial=slicing.partial)

    with mock.patch.object(adapters, "sliced", faulty):
        return train(case)


def test_factors_whose_gradients_are_not_added_up_would_differ_between_ranks():
    first, second = (outcome.gradients for outcome in run_ranks(2, without_sums, lora("tp2", steps=1)))
    differing = {name for name, value in first.items() if not value.equal(second[name])}
    assert {name.split(".", 4)[4] for name in differing} == {"o_proj.lora_B.weight"} | {
        "down_proj.lora_B.weight"
    }  # those of A are zero as long as B is


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["single", "dp_shard2-zero3", "tp2"])
def test_adapters_beside_products_in_fp8(layout):
    """The same rounded products of the model's own weights; adapters are not rounded. As near as parity asks
    of other formats (docs/parity.md).
    """
    fields = model(hidden_size=128, intermediate_size=128, head_dim=16)
    case = lora(layout, fields, more=FP8, precision="bf16_mixed", lr=1e-3)
    found = dict(zip(("loss", "norm"), measured(case), strict=True))
    assert found["loss"] < 5e-3, found
    assert found["norm"] < 5e-2, found


def measured(case: Case) -> tuple[float, float]:
    from tests.cases import differences, on_ranks

    found = differences(on_ranks(case), reference(case))
    return found["loss_rel"], found["grad_norm_rel"]


@pytest.mark.parametrize(
    ("before", "after"), [("pp2", "dp_shard2-zero3"), pytest.param("tp2", "pp2-tp2", marks=SLOW)]
)
def test_another_layout_continues(before, after, tmp_path):
    losses, resumed = both(lora(before), lora(after), tmp_path / "checkpoint")
    assert resumed == pytest.approx(losses, rel=1e-5)


def saved(case: Case, path: Path) -> set[str]:
    from hybridtrain.checkpoint import sharded

    start(case).save(path, Progress(0, 0, {})).result()
    return set(sharded.stored_keys(path))


def test_a_checkpoint_has_adapters_alone(tmp_path):
    case = lora("single", more=(("adapters.match", ["*.q_proj"]), ("optim.ema", 0.9)))
    (keys,) = run_ranks(1, saved, case, tmp_path / "checkpoint")
    of_model = {key for key in keys if key.startswith(("model.", "ema."))}
    assert len(of_model) == 2 * 2 * 4
    assert all(".q_proj.lora_" in key for key in of_model)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16_pure", marks=SLOW)])
def test_memory_and_work_count_what_is_trained(precision):
    case = lora("single", precision=precision)
    config = case.config()
    settled = engines.settle(config, world_size=1)
    facts, width = settled.facts, {"fp32": 4, "bf16_pure": 2}[precision]
    need = memory.needs(
        config, parallel=config.parallel, layout=settled.layout, plan=settled.plan, facts=facts
    )
    assert need.state == run_ranks(1, held, case)[0] + facts.parameters * width
    whole = dataclasses.replace(facts, adapters=())
    added = flops.flops_per_token(facts, seq_len=16) - 6 * sum(facts.adapters)
    own = flops.flops_per_token(whole, seq_len=16)
    used = facts.parameters - facts.vocab * facts.hidden
    assert own - added == 2 * used  # no gradients of the model's own weights
