"""lion, sgd and adamw: the updates of their authors, the same under every layout and after another's
checkpoint; rules for single parameters."""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridtrain.cli.main import main
from hybridtrain.config import compose
from hybridtrain.config.schema import AdaptersConfig, OptimConfig
from hybridtrain.errors import UserError
from hybridtrain.models import patterns
from hybridtrain.models.build import hf_config, plain_model
from hybridtrain.optim import optimizer
from hybridtrain.optim.shards import decay_of, local_shards, rate_of
from hybridtrain.optim.stored import Formats
from tests.cases import Case, differences, model, on_ranks, reference
from tests.documents import commands
from tests.engine.test_state import both, load_and_go_on, save_and_go_on
from tests.ranks import run_ranks

SLOW = pytest.mark.slow
PLAIN = Formats("auto", "kahan", 0)
ONE, ZERO = torch.tensor(1.0), torch.tensor(0.0)


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of arXiv 2302.06675."""

    def __init__(self, parameters: list[Any], *, lr: float, betas: tuple[float, float], decay: float):
        super().__init__(parameters, {"lr": lr, "betas": betas, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # noqa: ARG002
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                update = torch.sign(beta1 * m + (1 - beta1) * p.grad) + group["decay"] * p
                p -= group["lr"] * update
                m.copy_(beta2 * m + (1 - beta2) * p.grad)


SGD: tuple[tuple[str, Any], ...] = (("optim.kind", "sgd"), ("optim.weight_decay", 0.0))
KINDS: dict[str, tuple[tuple[str, Any], ...]] = {
    "lion": (("optim.kind", "lion"), ("optim.betas", [0.9, 0.99])),
    "sgd": SGD,
    "sgd, nesterov": (*SGD, ("optim.nesterov", True)),
    "sgd, no momentum": (*SGD, ("optim.momentum", 0.0)),
}


def settings_of(kind: str) -> OptimConfig:
    settings = OptimConfig(lr=1e-2)
    for path, value in KINDS[kind]:
        setattr(settings, path.partition(".")[2], value)
    return settings


def theirs(kind: str, weight: torch.nn.Parameter) -> torch.optim.Optimizer:
    if kind == "lion":
        return Lion([weight], lr=1e-2, betas=(0.9, 0.99), decay=0.1)
    momentum = 0.0 if kind.endswith("no momentum") else 0.9
    return torch.optim.SGD([weight], lr=1e-2, momentum=momentum, nesterov=kind.endswith("nesterov"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_updates_are_those_of_the_authors(kind: str, dtype: torch.dtype) -> None:
    """Also with the gradient divided by 4, and after a skipped step, which leaves no trace."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 30, generator=generator, dtype=dtype)
    mine, other = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(weight.clone())
    ours = optimizer.build(
        local_shards([("proj.weight", mine)]), settings_of(kind), formats=PLAIN, parts={}, group=None
    )
    reference_ = theirs(kind, other)
    for step in range(6):
        gradient = torch.randn(40, 30, generator=generator, dtype=dtype)
        skip = step == 2
        mine.grad = gradient * (torch.nan if skip else 4)
        ours.step(lr=1e-2, divide=4 * ONE.to(dtype), skip=ONE if skip else ZERO)
        if not skip:
            other.grad = gradient
            reference_.step()
    torch.testing.assert_close(mine, other, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-7)
    assert mine.grad is None


LAYOUTS = ("dp_shard2-zero3", "tp2", "pp2", "dp_replicate2", "pp2-tp2")


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        pytest.param(kind, layout, marks=() if (kind, layout) in (("lion", "tp2"), ("sgd", "pp2")) else SLOW)
        for kind, layout in itertools.product(("lion", "sgd", "sgd, nesterov"), LAYOUTS)
    ],
)
def test_a_layout_trains_as_one_process_does(kind: str, layout: str) -> None:
    """lion moves a weight whose direction is near 0 one way or the other: a few of them."""
    case = Case(layout, model(tie_word_embeddings=True), steps=3, overrides=KINDS[kind])
    ours, plain = on_ranks(case), reference(case)
    found = differences(ours, plain)
    assert found["grad_rel"] < 1e-5, found
    assert found["loss_rel"] < (1e-5 if kind != "lion" else 1e-4), found
    if kind == "lion":
        moved = [(ours.parameters[name] - value).abs() > 1e-6 for name, value in plain.parameters.items()]
        assert sum(int(each.sum()) for each in moved) < 1e-3 * sum(each.numel() for each in moved)
    else:
        assert found["param_abs"] < 1e-7, found


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("lion", "dp_shard2-zero3", "tp2"),
        *(
            pytest.param(kind, before, after, marks=SLOW)
            for kind in ("sgd", "lion")
            for before, after in (("tp2", "pp2"), ("pp2", "dp_shard2-zero3"), ("single", "single"))
        ),
    ],
)
def test_another_layout_goes_on(kind: str, before: str, after: str, tmp_path: Path) -> None:
    saved, loaded = (Case(layout, steps=4, overrides=KINDS[kind]) for layout in (before, after))
    losses, resumed = both(saved, loaded, tmp_path / "checkpoint")
    assert resumed == (losses if before == after else pytest.approx(losses, rel=1e-4))


@pytest.mark.parametrize("kind", ["lion", pytest.param("sgd", marks=SLOW)])
def test_bf16_weights_are_compensated(kind: str) -> None:
    """bf16_pure with kahan is bf16_mixed with the gradients of bf16 weights: no update is lost."""
    overrides = (*KINDS[kind], ("precision.rounding", "kahan"))
    case = Case("dp_shard2-zero2", precision="bf16_pure", steps=3, overrides=overrides)
    assert differences(on_ranks(case), reference(case))["loss_rel"] < 1e-3


RULES = [
    {"match": "*.embed_tokens.*", "lr": 1e-4, "weight_decay": 0.0},
    {"match": "*.q_proj.weight", "weight_decay": 0.5},
    {"match": "*norm*", "lr": 5e-3},
]


@pytest.mark.parametrize("kind", ["adamw", "lion", pytest.param("sgd", marks=SLOW)])
@pytest.mark.parametrize("layout", ["single", pytest.param("pp2-tp2", marks=SLOW)])
def test_parameters_have_rates_and_decays_of_their_own(kind: str, layout: str) -> None:
    """Against one process in which every parameter is a group."""
    overrides = (
        *KINDS.get(kind, ()),
        ("optim.rules", RULES),
        ("optim.clip", 0.0),
        ("optim.weight_decay", 0.1),
    )
    case = Case(layout, steps=1, lr=1e-2, overrides=overrides)
    plain, ours = reference(Case(layout, steps=0, lr=1e-2, overrides=overrides)), on_ranks(case)
    for name, before in plain.parameters.items():
        weight = torch.nn.Parameter(before.clone())
        lr = 1e-4 if "embed_tokens" in name else 5e-3 if "norm" in name else 1e-2
        decay = 0.0 if "embed_tokens" in name or before.dim() < 2 else 0.5 if "q_proj" in name else 0.1
        weight.grad = ours.gradients[name].clone()
        match kind:
            case "adamw":
                torch.optim.AdamW([weight], lr=lr, betas=(0.9, 0.95), eps=1e-6, weight_decay=decay).step()
            case "lion":
                Lion([weight], lr=lr, betas=(0.9, 0.99), decay=decay).step()
            case "sgd":
                weight.data -= lr * (weight.grad + decay * weight.data)
        assert (weight - ours.parameters[name]).abs().max() < 1e-3 * lr, name


def test_the_rules_of_the_documents_decay_layer_by_layer() -> None:
    [line] = [line for line in commands("docs/optimizers.md") if "run.name=layerwise" in line]
    config = compose.compose("train", shlex.split(line)[2:])
    built = hf_config(config.model.config, chosen={}, attention="sdpa")
    names = [name for name, _ in plain_model(built).named_parameters()]
    patterns.check(names, freeze=[], optim=config.optim, adapters=config.adapters)
    assert config.optim.lr == 1e-3
    for name in names:
        layer = re.search(r"layers\.(\d)", name)
        depth = 4 - int(layer[1]) if layer else 5 if "embed" in name else 0
        assert rate_of(name, settings=config.optim) == pytest.approx(0.8**depth), name


def test_the_first_rule_counts() -> None:
    settings = OptimConfig(lr=1e-3, rules=[{"match": "a.*", "lr": 2e-3}, {"match": "*", "weight_decay": 0.3}])
    assert (rate_of("a.b", settings=settings), rate_of("c", settings=settings)) == (2.0, 1.0)
    assert decay_of("a.b", 2, settings=settings) == settings.weight_decay
    assert decay_of("c", 1, settings=settings) == 0.3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim=lion", "optim.momentum=0.5"], r"optim\.momentum=0\.5: optim\.kind=lion reads none"),
        (["optim=sgd", "optim.betas=[0.9,0.9]"], r"optim\.betas=.*: optim\.kind=sgd reads none"),
        (["optim=adamw", "optim.nesterov=true"], r"optim\.nesterov=.*reads none"),
        (["optim=sgd", "optim.nesterov=true", "optim.momentum=0"], r"looks ahead along the momentum"),
        (["optim=lion", "precision.state=8bit"], r"precision\.state=8bit: 8 bits are for Adam's two moments"),
        (["optim=lion", "engine=deepspeed"], r"engine=deepspeed has only AdamW"),
        (["optim.rules=[{match: '*'}]"], r"optim\.rules\[0\].*not a pattern with"),
        (["optim.rules=[{match: '*', lr: 0}]"], r"optim\.rules\[0\]\.lr=0.*above 0"),
        (["optim.rules=[{match: '*', rate: 1}]"], r"optim\.rules\[0\].*lr: NUMBER"),
    ],
)
def test_what_does_not_go_together_is_refused(words: list[str], said: str) -> None:
    from hybridtrain.config import checks

    with pytest.raises(UserError, match=rf"(?s){said}"):
        checks.check(compose.compose("train", ["model=tiny", "data.path=x", "train.steps=1", *words]))


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ([{"match": "*.nothing", "lr": 1}], "it matches no parameter"),
        ([{"match": "*", "lr": 1}, {"match": "a.b", "lr": 2}], "matched by rules before it"),
    ],
)
def test_rules_that_change_nothing_are_refused(rules: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(UserError, match=said):
        patterns.check(["a.b", "c.d"], freeze=[], optim=OptimConfig(rules=rules), adapters=AdaptersConfig())


def test_a_registered_optimizer_that_leaves_rules_out_is_refused() -> None:
    from hybridtrain import registry

    @registry.register("optimizer", "own_groups")
    def own_groups(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for group in groups for p in group["params"]], lr=config.lr)

    named = [(name, torch.nn.Parameter(torch.zeros(2, 2))) for name in ("a.weight", "b.weight")]
    settings = OptimConfig(kind="own_groups", lr=1e-2, rules=[{"match": "a*", "lr": 1e-5}])
    with pytest.raises(UserError, match=r"optim\.rules.*own_groups makes leave out their rates"):
        optimizer.build(local_shards(named), settings, formats=PLAIN, parts={}, group=None)


def test_momentum_begins_at_0_where_a_checkpoint_has_none(tmp_path: Path) -> None:
    without, momentum = (
        Case("single", steps=4, overrides=KINDS[kind]) for kind in ("sgd, no momentum", "sgd")
    )
    path = tmp_path / "checkpoint"
    run_ranks(1, save_and_go_on, without, path)
    ((state, losses),) = run_ranks(1, load_and_go_on, momentum, path)
    assert all(math.isfinite(loss) for loss in losses)
    moments = [value for key, value in state.items() if key.endswith(".momentum")]
    assert moments
    assert not any(value.any() for value in moments)


def test_parity_of_lion_allows_for_its_signs(tmp_path: Path) -> None:
    """Of nearly equal numbers, one may be above 0 and the other below: moves of the rate either way."""
    words = ["model=tiny", "optim=lion", "data.seq_len=32", "batch.global_batch_size=4", "optim.lr=1e-2"]
    words += ["parity.layouts=[single]", "parity.steps=2", f"run.dir={tmp_path}"]
    assert main(["parity", *words]) == 0
    told = json.loads((tmp_path / "parity.json").read_text())["layouts"][0]
    assert told["passed"]
