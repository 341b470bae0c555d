"""QLoRA: adapters beside frozen weights in codes train under every layout as one plain process with the weights
that the codes stand for."""

import dataclasses

import pytest

from hybridtrain import engine as engines
from hybridtrain.errors import UserError
from hybridtrain.plan import memory
from tests.cases import Case, assert_parity, differences, model, on_ranks, reference, start
from tests.engine.test_adapters import lora
from tests.plan.test_memory import held
from tests.ranks import run_ranks

SLOW = pytest.mark.slow
WIDE = {"hidden_size": 128, "intermediate_size": 256}
"""Rows of two and of four blocks."""


def qlora(layout: str, kind: str, *, more: tuple = (), **options) -> Case:
    return lora(layout, model(**WIDE), more=(("adapters.base_format", kind), *more), **options)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("nf4", "dp_shard2-zero3"),
        *(
            pytest.param(kind, layout, marks=SLOW)
            for kind, layout in [
                *(("nf4", layout) for layout in ("dp_replicate2", "tp2", "pp2", "pp2-dp_shard2-zero1")),
                *(("int8", layout) for layout in ("dp_shard2-zero3", "tp2", "pp2-tp2")),
            ]
        ),
    ],
)
def test_layouts_equal_the_plain_process_with_the_same_weights(kind, layout):
    """Codes and scales are among the parameters that are compared."""
    assert assert_parity(qlora(layout, kind))["param_abs"] < 1e-4
