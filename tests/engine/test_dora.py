"""DoRA: every layout trains directions and lengths of weights as one plain process."""

import pytest

from tests.cases import Case, assert_parity, model, reference
from tests.engine.test_adapters import lora
from tests.engine.test_quantised import WIDE
from tests.families.copies import fields_of

SLOW = pytest.mark.slow
DORA = ("adapters.dora", True)
COMPILED = (("engine.compile", True), ("engine.compile_backend", "aot_eager"))
OTHERS = (
    ("llama", "dp_replicate2", ()),
    ("llama", "pp2-dp_shard2-zero3", (("recompute.kind", "selective"),)),
    ("llama", "tp4", ()),
    ("llama", "tp2", (("adapters.dropout", 0.2), ("recompute.kind", "full"))),
    ("llama", "tp2", (("adapters.dropout", 0.2), ("recompute.kind", "selective"), *COMPILED)),
    ("wide", "tp2", (("adapters.base_format", "nf4"),)),
    ("wide", "dp_shard2-zero3", (("adapters.base_format", "int8"),)),
    ("gpt2", "tp2", ()),
    ("gemma2", "pp2-tp2", ()),
    ("phi3", "tp2-nosp", (("adapters.dropout", 0.2),)),
)


def dora(model_type: str, layout: str, *more: tuple, **options) -> Case:
    fields = model() if model_type == "llama" else model(**WIDE) if model_type == "wide" else None
    fields = fields or fields_of(model_type)
    if layout == "tp4":  # fewer key/value heads than ranks
        fields["num_key_value_heads"] = 2
    return lora(layout, fields, more=(DORA, *more), **options)


@pytest.mark.parametrize(
    ("model_type", "layout", "more"),
    [
        ("llama", "tp2", ()),
        ("llama", "dp_shard2-zero3", ()),
        *(pytest.param(*case, marks=SLOW) for case in OTHERS),
    ],
)
def test_layouts_equal_the_plain_process(model_type, layout, more):
    assert_parity(dora(model_type, layout, *more))


def test_it_begins_at_the_model_and_trains_its_lengths():
    with_it, without = reference(dora("llama", "single")), reference(lora("single"))
    assert with_it.losses[0] == pytest.approx(without.losses[0], rel=1e-6)
    assert abs(with_it.losses[2] - without.losses[2]) > 1e-4 * without.losses[2]
    names = [name for name in with_it.gradients if name.endswith("lora_magnitude_vector")]
    assert len(names) == 4 * 7
    assert all(with_it.gradients[name].norm() > 0 for name in names)
