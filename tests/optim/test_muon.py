"""Muon: torch's own in fp32, one process under every layout, matrices in one parameter apart."""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridtrain.analysis.facts import facts
from hybridtrain.config.schema import OptimConfig
from hybridtrain.models.init import local_slices
from hybridtrain.optim import matrices, muon, optimizer
from hybridtrain.optim.shards import like, local_shards
from hybridtrain.optim.stored import Formats
from hybridtrain.plan import layout as layouts
from hybridtrain.plan import optimizer_states
from tests.cases import Case, differences, model, on_ranks, reference, start, whole
from tests.dispatch import Alive
from tests.engine.test_state import both
from tests.families.copies import config_of, fields_of
from tests.ranks import run_ranks

SLOW = pytest.mark.slow
MUON: tuple[tuple[str, Any], ...] = (
    ("optim.kind", "muon"),
    ("optim.momentum", 0.95),
    ("optim.nesterov", True),
)
SETTINGS = OptimConfig(kind="muon", lr=1e-2, momentum=0.95, nesterov=True, weight_decay=0.1)
ONE, ZERO = torch.tensor(1.0), torch.tensor(0.0)


def trained(weight: torch.Tensor, parts: matrices.Parts, gradients: list[torch.Tensor]) -> torch.Tensor:
    mine = torch.nn.Parameter(weight.clone())
    ours = optimizer.build(
        local_shards([("a.weight", mine)]),
        SETTINGS,
        formats=Formats("auto", "kahan", 0),
        parts={"a.weight": parts},
        group=None,
    )
    for gradient in gradients:
        mine.grad = gradient.clone()
        ours.step(lr=1e-2, divide=ONE, skip=ZERO)
    return mine.detach()


def noise(*shape: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_steps_are_those_of_torchs_muon(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With its iterations in fp32, as ours: it casts to bf16."""
    weight, *gradients = noise(*shape, count=5)
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())
    theirs = torch.nn.Parameter(weight.clone())
    other = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        theirs.grad = gradient.clone()
        other.step()
    ours = trained(weight, (0, (shape[0],)), gradients)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-6)


def test_the_update_is_nearly_orthogonal() -> None:
    (matrix,) = noise(3, 20, 50, count=1)
    values = torch.linalg.svdvals(muon.orthogonal(matrix))
    assert values.min() > 0.3
    assert values.max() < 1.3


@pytest.mark.parametrize("dim", [0, 1])
def test_matrices_in_one_parameter_are_orthogonal_apart(dim: int) -> None:
    weight, *gradients = noise(30, 30, count=4)
    lengths = (12, 9, 9)
    whole = trained(weight, (dim, lengths), gradients)
    apart = [
        trained(part, (0, (part.shape[0],)), [gradient.split(lengths, dim)[number] for gradient in gradients])
        for number, part in enumerate(weight.split(lengths, dim))
    ]
    torch.testing.assert_close(whole, torch.cat(apart, dim), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("model_type", "fields", "wanted"),
    [
        ("gpt2", {}, {"attn.c_attn.weight": 3, "mlp.c_fc.weight": 1}),
        ("phi3", {}, {"self_attn.qkv_proj.weight": 3, "mlp.gate_up_proj.weight": 2}),
        ("mixtral", {}, {"self_attn.q_proj.weight": 1, "experts.gate_up_proj": 2}),
        ("gpt_neox", {}, {"attention.query_key_value.weight": 1}),
        ("cohere", {"use_qk_norm": True}, {"self_attn.q_proj.weight": 1}),
        ("gemma2", {}, {"self_attn.o_proj.weight": 1, "mlp.down_proj.weight": 1}),
    ],
)
def test_the_matrices_of_a_model(model_type: str, fields: dict[str, Any], wanted: dict[str, int]) -> None:
    from hybridtrain.models.build import hf_config

    small = hf_config(fields_of(model_type, **fields), chosen={}, attention="sdpa")
    found = matrices.of_model(small)
    for name, count in wanted.items():
        own = {len(lengths) for key, (_, lengths) in found.items() if key.endswith(name)}
        assert own == {count}, name
    assert not any(
        word in name for name in found for word in ("embed", "wte", "lm_head", "norm", "ln_", "bias")
    )
    assert config_of(model_type)


FAMILIES = {"llama": model(tie_word_embeddings=True), "odd": model(intermediate_size=90)}


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("llama", "dp_shard2-zero3"),
        ("phi3", "tp2"),
        *(
            pytest.param(kind, layout, marks=SLOW)
            for kind, layout in (
                ("llama", "tp2"),
                ("llama", "pp2"),
                ("llama", "dp_replicate2"),
                ("llama", "dp_shard2-tp2-zero3"),
                ("llama", "pp2-dp_shard2-zero1"),
                ("llama", "dp_shard4-zero2"),
                ("phi3", "dp_shard2-zero3"),
                ("gpt2", "dp_shard2-tp2-zero1"),
                ("mixtral", "dp_shard2-zero3"),
                ("mixtral", "tp2"),
                ("gpt_neox", "dp_shard2-tp2-zero3"),
                ("llama", "tp4"),
                ("odd", "dp_shard4-zero3"),
            )
        ),
    ],
)
def test_a_layout_trains_as_one_process_does(kind: str, layout: str) -> None:
    fields = FAMILIES.get(kind) or fields_of(kind)
    case = Case(layout, fields, steps=3, lr=1e-3, overrides=MUON)
    found = differences(on_ranks(case), reference(case))
    assert found["grad_rel"] < 1e-5, found
    assert found["loss_rel"] < 2e-5, found
    assert found["grad_norm_rel"] < 1e-3, found
    assert found["param_abs"] < 1e-5, found


@pytest.mark.parametrize(
    ("before", "after"),
    [("dp_shard2-zero3", "tp2"), pytest.param("pp2", "dp_shard2-zero3", marks=SLOW), ("single", "single")],
)
def test_another_layout_goes_on(before: str, after: str, tmp_path: Path) -> None:
    saved, loaded = (Case(layout, steps=4, overrides=MUON) for layout in (before, after))
    losses, resumed = both(saved, loaded, tmp_path / "checkpoint")
    assert resumed == (losses if before == after else pytest.approx(losses, rel=1e-4))


@pytest.mark.parametrize("precision", ["bf16_mixed", pytest.param("bf16_pure", marks=SLOW), "fp16_mixed"])
def test_other_precisions_train(precision: str) -> None:
    case = Case("dp_shard2-zero2", precision=precision, steps=4, lr=1e-2, overrides=MUON)
    losses = on_ranks(case).losses
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "layout", ["dp_shard2-zero3", *(pytest.param(each, marks=SLOW) for each in ("pp2", "dp_replicate2"))]
)
def test_frozen_matrices_and_rules(layout: str) -> None:
    """A stage without trained matrices, and matrices with rates of their own."""
    rules = [{"match": "*.down_proj.weight", "lr": 3e-3, "weight_decay": 0.0}]
    freeze = ("model.embed_tokens.*", "model.layers.0.*", "model.layers.1.*")
    case = Case(layout, steps=3, freeze=freeze, overrides=(*MUON, ("optim.rules", rules)))
    plain = dataclasses.replace(case, layout="single")
    found = differences(on_ranks(case), on_ranks(plain))
    assert found["loss_rel"] < 1e-5, found
    assert found["param_abs"] < 1e-5, found


def test_fp64_is_fp64() -> None:
    case = Case("dp_shard2-zero3", precision="fp64", steps=3, overrides=MUON)
    found = differences(on_ranks(case), reference(case))
    assert found["loss_rel"] < 1e-12, found
    assert found["param_abs"] < 1e-12, found


def moved(case: Case) -> dict[str, torch.Tensor]:
    """Whole weights after three updates with gradients that are the same under every layout."""
    engine = start(case)
    for step in range(3):
        for item in engine.optimizer.shards:
            generator = torch.Generator().manual_seed(step + zlib.crc32(item.name.encode()))
            gradient = torch.randn(item.parameter.shape, generator=generator)
            part = gradient[local_slices(item.parameter)].contiguous()
            item.parameter.grad = like(part, item.parameter, shape=item.parameter.shape)
        engine.optimizer.step(lr=1e-2, divide=ONE, skip=ZERO)
    return {name: whole(parameter) for name, parameter in engine.weights()}


@pytest.mark.parametrize(
    "layout",
    ["dp_shard2-zero3", "pp2-tp2"]
    + [pytest.param(each, marks=SLOW) for each in ("dp_replicate2", "dp_shard2-zero1", "dp_shard4-zero2")],
)
def test_equal_momenta_are_equal_updates_bit_for_bit(layout: str) -> None:
    case = Case(layout, FAMILIES["odd"], overrides=MUON)
    (alone,) = run_ranks(1, moved, dataclasses.replace(case, layout="single"))
    for parameters in run_ranks(case.world_size, moved, case):
        assert [name for name, value in parameters.items() if not torch.equal(value, alone[name])] == []


def peak(case: Case) -> int:
    """Most bytes of an update besides weights, gradients and state."""
    engine, alive = start(case), Alive()
    for item in engine.optimizer.shards:
        gradient = torch.ones_like(item.shard)
        item.parameter.grad = like(gradient, item.parameter, shape=item.parameter.shape)
        for tensor in (gradient, item.shard, *engine.optimizer.fields(item).values()):
            alive.known.add(tensor.untyped_storage()._cdata)
    with alive:
        engine.optimizer.step(lr=1e-2, divide=ONE, skip=ZERO)
    return alive.peak


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("muon", "dp_replicate2"),
        *(
            pytest.param(kind, layout, marks=SLOW)
            for kind, layout in (
                ("muon", "single"),
                ("muon", "dp_shard2-zero3"),
                ("muon", "tp2"),
                ("muon", "dp_replicate4"),
                ("adafactor", "single"),
                ("adafactor", "dp_shard2-zero3"),
            )
        ),
    ],
)
def test_the_memory_of_an_update_is_what_planning_says(kind: str, layout: str) -> None:
    """At least, and not much more, but for what is updated at a time."""
    fields = model(num_hidden_layers=2, hidden_size=256, intermediate_size=2048)
    case = Case(layout, fields, overrides=(("optim.kind", kind), ("optim.momentum", 0.95)))
    parallel = case.config().parallel
    planned = optimizer_states.bytes_of_update(
        case.config(),
        layout=layouts.resolve(parallel, world_size=case.world_size),
        facts=facts(fields),
        ends=[range(2)],
    )
    assert planned <= max(run_ranks(case.world_size, peak, case)) < 1.5 * planned + 8 * 4 * 2**16
