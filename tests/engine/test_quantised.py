"""QLoRA: adapters beside frozen weights in codes train under every layout as one plain process with the
weights that the codes stand for."""

import dataclasses

import pytest
import torch

from hybridtrain import engine as engines
from hybridtrain.errors import UserError
from hybridtrain.models import quantised
from hybridtrain.plan import memory
from tests.cases import Case, assert_parity, differences, model, on_ranks, reference
from tests.engine.test_adapters import lora
from tests.families.copies import fields_of

SLOW = pytest.mark.slow
WIDE = {"hidden_size": 128, "intermediate_size": 256}
"""Rows of two and of four blocks."""


def qlora(layout: str, kind: str, **fields) -> Case:
    return lora(layout, model(**{**WIDE, **fields}), more=(("adapters.base_format", kind),))


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
    """Codes, which are numbers of 1 and more, are among the parameters that are compared."""
    assert_parity(qlora(layout, kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_codes_and_scales_stay_as_they_are_where_weights_are_cast(kind):
    case = dataclasses.replace(qlora("dp_shard2-zero3", kind), precision="bf16_mixed", lr=1e-3)
    ours, theirs = on_ranks(case), reference(case)
    names = {name for name in theirs.parameters if name.endswith(quantised.LARGEST)}
    assert len(names) == 4 * 7
    for name in names | {name.removesuffix("_absmax") for name in names}:
        assert torch.equal(ours.parameters[name], theirs.parameters[name]), name
    found = differences(ours, theirs)
    assert found["loss_rel"] < 2e-3, found
    assert found["grad_norm_rel"] < 5e-2, found


@pytest.mark.parametrize(("kind", "error"), [("nf4", 0.152), ("int8", 0.51 / 127)])
def test_values_are_the_nearest_ones(kind, error):
    """In nf4, the widest gap between neighbouring levels is 0.304."""
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    codes, largest = quantised.quantise(weight, kind, dtype=torch.float32)
    values = quantised.values(codes, largest)
    size = codes.numel() * codes.element_size()
    assert size == weight.numel() // (2 if kind == "nf4" else 1)
    blocks = (values - weight).unflatten(-1, (largest.shape[1], -1))
    assert (blocks.abs() <= error * largest.unsqueeze(-1)).all()
    assert torch.equal(values[3], weight[3])
    again = quantised.quantise(values, kind, dtype=torch.float32)
    assert torch.equal(again[0], codes)


def test_the_gradient_of_the_input_is_that_of_a_plain_layer():
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(64, 3)
    codes, largest = quantised.quantise(layer.weight.detach(), "nf4", dtype=torch.float32)
    weight = quantised.values(codes, largest)
    quantised.convert(layer, "nf4")
    layer.weight.data, layer.weight_absmax.data = codes, largest
    layer.bias.requires_grad_(False)
    x = torch.randn(2, 5, 64, generator=generator, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, torch.nn.functional.linear(x, weight, layer.bias))
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * y.detach() @ weight)


def test_planning_counts_codes():
    needs = {}
    for kind in ("none", "nf4", "int8"):
        config = qlora("single", kind).config()
        settled = engines.settle(config, world_size=1)
        run = {"parallel": config.parallel, "layout": settled.layout, "plan": settled.plan}
        needs[kind] = memory.needs(config, **run, facts=settled.facts).state
    of_layers = settled.facts.quantised
    weights, rows = (sum(getattr(each, name) for each in of_layers) for name in ("weights", "largest"))
    assert needs["none"] - needs["nf4"] == weights * 4 - weights // 2 - weights // quantised.BLOCK * 4
    assert needs["none"] - needs["int8"] == weights * 4 - weights - rows * 4


@pytest.mark.parametrize(
    ("case", "world_size", "words"),
    [
        (qlora("tp2", "nf4", hidden_size=64), 2, "parallel.tp=2: a block of frozen weights"),
        (qlora("single", "nf4", hidden_size=96), 1, "rows of 96 weights(?s:.*)adapters.base_format=int8"),
    ],
    ids=["a block on two ranks", "rows of no whole blocks"],
)
def test_what_is_refused(case, world_size, words):
    with pytest.raises(UserError, match=words):
        engines.settle(case.config(), world_size=world_size)


def test_transposed_weights_are_refused():
    case = dataclasses.replace(qlora("single", "int8"), fields=fields_of("gpt2"))
    with pytest.raises(UserError, match="stores weights transposed"):
        engines.settle(case.config(), world_size=1)
