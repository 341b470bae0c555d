"""Quantisation-aware training multiplies by what `hybridtrain quantize` stores, under every layout, and its
gradients pass straight through.

Weights are equal in a first step, and round alike: every layout is equal to one plain process in fp32. In
later steps the last bits of weights differ, and now and then a code: in fp64 none does.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from hybridtrain.analysis.probe import ThreadRanks
from hybridtrain.config.schema import PrecisionConfig
from hybridtrain.errors import UserError
from hybridtrain.models.build import hf_config
from hybridtrain.models.linears import linears_of
from hybridtrain.parity.verdict import tolerances
from hybridtrain.plan.formats import BLOCK, FORMATS, SCHEMES
from hybridtrain.precision import integers, rules
from hybridtrain.precision.qlinear import Product, convert, product, weight_scale
from hybridtrain.quantize.grids import grid_of
from hybridtrain.quantize.schemes import Scheme, parse
from tests import cases
from tests.cases import GPT2, Case
from tests.ranks import RankFailed
from tests.runs import four_parts

WHOLE_GROUPS = cases.model(intermediate_size=128)  # on each of two ranks, too
NO_DROPOUT = {**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def scheme_of(name: str) -> Scheme:
    return parse(SCHEMES[name], field="quantize.scheme")


def weight(outputs: int = 48, inputs: int = 64) -> torch.Tensor:
    """Rows and columns of unequal size, a group of zeros."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(outputs, inputs, generator=generator) * torch.logspace(-3, 1, inputs)
    found[5] = 0
    return found


@pytest.mark.parametrize("name", list(SCHEMES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_with_the_numbers_of_the_scheme(name: str, dtype: torch.dtype) -> None:
    """Bit for bit; and written out: codes that fit the bits, times scales of bf16."""
    w = weight().to(dtype).requires_grad_()
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    g = torch.randn(8, 48, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = product(x, w, Product(FORMATS[name], "", None, native=False))
    dx, dw = torch.autograd.grad(y, (x, w), g)
    with torch.no_grad():
        stored = grid_of(w, scheme_of(name)).rounded(w.float(), start=0)
        size, largest = (64, 127) if name == "qat_int8" else (BLOCK, 7)
        groups = w.float().reshape(48, -1, size)
        scale = (groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / largest).bfloat16().float()
        codes = torch.clamp(torch.round(groups / scale), -largest, largest)
        assert torch.equal(stored, (codes * scale).reshape(48, 64))
        assert not torch.equal(stored.to(dtype), w)
        assert torch.equal(y, x @ stored.to(dtype).t())
        assert torch.equal(dx, g @ stored.to(dtype))
        assert torch.equal(dw, g.t() @ x)


@pytest.mark.parametrize("name", list(SCHEMES))
def test_the_table_of_formats_has_the_sizes_of_the_schemes(name: str) -> None:
    format_, scheme = FORMATS[name], scheme_of(name)
    assert format_.w.bits == scheme.bits
    assert (format_.scale, scheme.share) in {("row", "row"), ("block", "group")}
    assert scheme.group == (BLOCK if format_.scale == "block" else 0)


@pytest.mark.parametrize("name", list(SCHEMES))
@pytest.mark.parametrize("cut", ["N", "K"])
def test_tensor_parallel_ranks_round_to_the_scales_of_the_whole(name: str, cut: str) -> None:
    """Columns grow by a factor of 1e4, so that scales of the parts would be others."""
    w = weight()
    parts = w.chunk(2, dim="NK".index(cut))
    slots: list[torch.Tensor | None] = [None, None]
    barrier = threading.Barrier(2)

    def rank(number: int) -> torch.Tensor:
        ranks = ThreadRanks(number, 2, slots=slots, barrier=barrier)
        scale = weight_scale(parts[number], Product(FORMATS[name], cut, ranks, native=False))
        return integers.rounded(parts[number], scale, FORMATS[name].w.largest)

    with ThreadPoolExecutor(2) as pool:
        found = torch.cat(list(pool.map(rank, range(2))), dim="NK".index(cut))
    assert torch.equal(found, grid_of(w, scheme_of(name)).rounded(w, start=0))


def test_rows_that_are_no_whole_groups_are_refused() -> None:
    """At planning, with the layer that has them; emulation, which would do nothing, too."""
    linears = linears_of(hf_config(cases.model(intermediate_size=80), chosen={}, attention="sdpa"))
    with pytest.raises(UserError) as caught:
        rules.check(linears, PrecisionConfig(compute="qat_int4"))
    words = "model.layers.0.mlp.down_proj has rows of 80 weights, which are not whole groups of 32"
    assert words in four_parts(str(caught.value), "precision.compute")
    rules.check(linears, PrecisionConfig(compute="qat_int8"))
    rules.check(
        linears, PrecisionConfig(compute="qat_int4", rules=[{"match": "*.down_proj", "compute": "high"}])
    )
    with pytest.raises(UserError, match="has no format to emulate"):
        rules.check_options(PrecisionConfig(compute="qat_int4", emulate=True))


def case(layout: str, compute: str, fields: dict[str, Any] = WHOLE_GROUPS, **given: Any) -> Case:
    overrides = (("precision.compute", compute), *given.pop("overrides", ()))
    return Case(layout, fields, overrides=overrides, **given)


def test_a_first_step_is_that_of_one_process() -> None:
    """And is another than without rounding."""
    of = case("tp2", "qat_int8", steps=1)
    one = cases.reference(of)
    found = cases.differences(cases.on_ranks(of), one)
    assert max(found[key] for key in ("loss_rel", "grad_norm_rel", "grad_rel")) < 1e-5, found
    assert found["param_abs"] < 0.05 * of.lr, found
    without = cases.differences(one, cases.reference(Case("tp2", WHOLE_GROUPS, steps=1)))
    assert without["grad_rel"] > 1e-3, without


def test_parity_asks_as_much_of_first_gradients_as_without_rounding() -> None:
    for compute, grad_rel in (("qat_int4", 1e-5), ("fp8_tensorwise", 0.33), ("", 1e-5)):
        found = tolerances(PrecisionConfig(compute=compute), tp=2, moved=1e-3, noise=0.3)
        assert found["grad_rel"] == pytest.approx(grad_rel), compute


LAYOUTS = (
    *("dp_replicate2", "dp_shard2-zero1", "dp_shard2-zero2", "dp_shard2-zero3", "tp2", "pp2", "pp2-tp2"),
)


@pytest.mark.slow
@pytest.mark.parametrize("compute", list(SCHEMES))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_one_process(layout: str, compute: str) -> None:
    """Three steps of four micro-batches, in fp64."""
    of = case(layout, compute, precision="fp64", steps=3)
    found = cases.differences(cases.on_ranks(of), cases.reference(of))
    assert max(found.values()) < 1e-9, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "fields", "overrides"),
    [
        ("tp2", NO_DROPOUT, ()),
        ("pp2-tp2", NO_DROPOUT, ()),
        ("dp_shard2-tp2-zero3", WHOLE_GROUPS, (("recompute.kind", "full"),)),
        ("tp2", WHOLE_GROUPS, (("recompute.kind", "selective"),)),
        (
            "pp2-tp2",
            cases.model(num_key_value_heads=1, intermediate_size=128),  # which ranks share
            (("precision.rules", [{"match": "*.down_proj", "compute": "qat_int8"}]),),
        ),
    ],
)
def test_other_models_rules_and_recomputation(
    layout: str, fields: dict[str, Any], overrides: tuple[tuple[str, Any], ...]
) -> None:
    of = case(layout, "qat_int4", fields, precision="fp64", steps=3, overrides=overrides)
    found = cases.differences(cases.on_ranks(of), cases.reference(of))
    assert max(found.values()) < 1e-9, found


@pytest.mark.slow
def test_a_compiled_product_is_the_same() -> None:
    layer, x = nn.Linear(64, 48), torch.randn(8, 64)
    convert(layer, Product(FORMATS["qat_int4"], "", None, native=False))
    found = []
    for each in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        y = each(x)
        [gradient] = torch.autograd.grad(y.square().sum(), layer.weight)
        found.append((y, gradient))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


@pytest.mark.slow
def test_groups_that_ranks_would_share_are_refused() -> None:
    words = "layers.0.mlp.down_proj: 48 inputs on a rank are no multiple of 32"
    with pytest.raises(RankFailed, match=words):
        cases.on_ranks(case("tp2", "qat_int4", cases.model()))
