"""A user's optimizer: the same update under every layout as in a plain loop, its state bit for bit through a
kill and another layout, and what is refused."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hybridtrain as ht
from hybridtrain.config.schema import OptimConfig
from hybridtrain.optim.shards import local_shards
from hybridtrain.optim.user_optimizer import UserOptimizer
from hybridtrain.types import Progress
from tests.cases import Case, start
from tests.dispatch import NoWait
from tests.ranks import RankFailed, run_ranks
from tests.runs import arguments, assert_equal_state, checkpoints, on_this_rank, rows

MODULE = "tests.optim.test_user_optimizer"


@ht.register("optimizer", "test_sgd")
def sgd(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=config.lr, momentum=0.9)


@ht.register("optimizer", "test_fused")
def fused(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, fused=True)


@ht.register("optimizer", "test_whole")
class Whole(torch.optim.Optimizer):
    """Looks at a whole matrix: wrong on a part of it."""

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig) -> None:
        super().__init__(groups, {"lr": config.lr})

    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad / p.grad.norm().clamp(min=1e-6), alpha=group["lr"])


@ht.register("optimizer", "test_numbers")
class Numbers(torch.optim.Optimizer):
    """Keeps a tensor, one without dimensions, and a number of each of Python's kinds, all of
    which the update reads."""

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig) -> None:
        super().__init__(groups, {"lr": config.lr})

    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(
                        steps=0, decay=1.0, odd=False, count=torch.zeros(()), mean=torch.zeros_like(p)
                    )
                state["steps"], state["decay"], state["odd"] = (
                    state["steps"] + 1,
                    state["decay"] * 0.7,
                    not state["odd"],
                )
                state["count"] += 1
                state["mean"].lerp_(p.grad, 0.5)
                p.sub_(
                    state["mean"],
                    alpha=group["lr"]
                    * state["decay"]
                    / float(state["count"])
                    / state["steps"]
                    * (1 + state["odd"]),
                )


class Killer(ht.Callback):
    def on_step(self, run: ht.Run, metrics: Any) -> None:  # noqa: ARG002
        if run.step == 4:
            os.kill(os.getpid(), signal.SIGKILL)


ht.register("callback", "test_killer")(Killer)


def config_for(kind: str, run: Path, *words: str) -> Any:
    given = [
        "model=tiny",
        "model.config.vocab_size=256",
        "data.seq_len=16",
        "batch.global_batch_size=8",
        "batch.micro_batch_size=2",
        f"run.dir={run}",
    ]
    return ht.compose(*given, f"run.plugins=[{MODULE}]", f"optim.kind={kind}", "optim.lr=0.1", *words)


@pytest.mark.parametrize(
    ("kind", "words", "layouts"),
    [
        ("test_sgd", [], ["single", "tp2", "pp2", "dp_shard2-zero3"]),
        ("test_sgd", ["model.config.tie_word_embeddings=true"], ["pp2"]),
        pytest.param(
            "test_numbers", [], ["dp_shard2-tp2-zero3", "pp2-dp_shard2-zero1"], marks=pytest.mark.slow
        ),
        pytest.param(
            "test_fused",
            ["precision=bf16_mixed"],
            ["single", "tp2", "pp2", "dp_shard2-zero3"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "test_sgd", ["precision=fp16_mixed"], ["single", "dp_shard2-zero3"], marks=pytest.mark.slow
        ),
    ],
)
def test_it_updates_as_in_a_plain_loop(
    kind: str, words: list[str], layouts: list[str], run_dir: Path
) -> None:
    found = ht.parity(config_for(kind, run_dir, *words), layouts=layouts)
    assert found.passed, [(row.layout, row.measured, row.error) for row in found.rows]
    assert len(found.rows) == len(layouts)
    # AdamW's: SGD moves elements less
    assert all(row.tolerance["param_abs"] != pytest.approx(0.1 * 3 * 0.05) for row in found.rows)


def test_one_that_looks_at_whole_matrices_is_found_out(run_dir: Path) -> None:
    found = ht.parity(config_for("test_whole", run_dir), layouts=["single", "dp_shard2-zero3"])
    assert [row.passed for row in found.rows] == [True, False]
    assert "param_abs" in found.rows[1].exceeded


def trained(argv: list[str]) -> Any:
    return on_this_rank([*argv, f"run.plugins=[{MODULE}]"])


def saved_again(case: Case, source: Path, target: Path) -> None:
    """Load a checkpoint under the layout of a case, and save at once."""
    engine = start(case)
    engine.save(target, engine.load(source)).result()


@pytest.mark.parametrize(
    ("kind", "parallel", "world_size"),
    [
        ("test_numbers", "single", 1),
        pytest.param("test_sgd", "zero3", 2, marks=pytest.mark.slow),
        pytest.param("test_numbers", "tp2", 2, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(
    kind: str, parallel: str, world_size: int, data: Path, tmp_path: Path
) -> None:
    given = {
        "parallel": parallel,
        "train__steps": 6,
        "checkpoint__every": 3,
        "checkpoint__asynchronous": "false",
        "optim__kind": kind,
        "optim__lr": 0.1,
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for ended in run_ranks(world_size, trained, arguments(whole, data, **given)):
        assert ended.code == 0, ended.err
    with pytest.raises(RankFailed):
        run_ranks(world_size, trained, [*arguments(killed, data, **given), "run.callbacks=[test_killer]"])
    assert checkpoints(killed) == ["step-00000003"]
    for ended in run_ranks(world_size, trained, [*arguments(killed, data, **given), "run.takeover=true"]):
        assert ended.code == 0, ended.err
    assert rows(killed) == rows(whole)
    assert_equal_state(killed / "checkpoints/step-00000006", whole / "checkpoints/step-00000006")


def first_steps(case: Case, target: Path) -> None:
    engine = start(case)
    for step in range(case.steps):
        engine.train_step(case.batches(step, dp_rank=engine.mesh.dp_rank, dp=engine.layout.dp), lr=case.lr)
    engine.save(target, Progress(case.steps, 0, {"model": "m"})).result()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("dp_shard2-zero3", "tp2"),
        ("pp2", "single"),
        pytest.param("single", "dp_shard2-zero1", marks=pytest.mark.slow),
    ],
)
def test_its_state_comes_back_under_another_layout(before: str, after: str, tmp_path: Path) -> None:
    of = lambda layout: Case(layout, overrides=(("optim.kind", "test_numbers"), ("run.plugins", [MODULE])))  # noqa: E731
    run_ranks(of(before).world_size, first_steps, of(before), tmp_path / "step-00000002")
    run_ranks(
        of(after).world_size,
        saved_again,
        of(after),
        tmp_path / "step-00000002",
        tmp_path / "again" / "step-00000002",
    )
    assert_equal_state(tmp_path / "again" / "step-00000002", tmp_path / "step-00000002")


# -- one process, a model of three matrices ------------------------------------------------------------------


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"proj": nn.Linear(5, 3), "norm": nn.LayerNorm(3)})


def own(kind: str, module: nn.Module) -> UserOptimizer:
    return UserOptimizer(local_shards(module.named_parameters()), OptimConfig(kind=kind, lr=0.1))


def stepped(optimizer: UserOptimizer, module: nn.Module, *, seed: int, skip: float = 0.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step(lr=0.05, divide=torch.tensor(4.0), skip=torch.tensor(skip))


@pytest.mark.parametrize("kind", ["test_sgd", "test_fused"])
@pytest.mark.parametrize("skipped", [(), (0,), (1,), (0, 1, 3)])
def test_skipped_steps_change_nothing(kind: str, skipped: tuple[int, ...]) -> None:
    """Also the first, in which torch's fused SGD would leave its momentum as it found the memory."""
    ours, theirs = small_model(), small_model()
    mine = own(kind, ours)
    groups = [
        {"params": [theirs["proj"].weight], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.dim() < 2]},
    ]
    plain = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    for step in range(4):
        stepped(mine, ours, seed=step, skip=float(step in skipped))
        generator = torch.Generator().manual_seed(step)
        for parameter in theirs.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator) / 4.0
        if step not in skipped:
            plain.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)


def test_fused_kernels_never_wait_and_others_once() -> None:
    for kind, waiting in (
        ("test_fused", contextlib.nullcontext()),
        ("test_sgd", pytest.raises(AssertionError, match="waits for the device")),
    ):
        module = small_model()
        optimizer = own(kind, module)
        stepped(optimizer, module, seed=0)
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        divide, skip = torch.tensor(4.0), torch.tensor(0.0)
        with waiting, NoWait():
            optimizer.step(lr=0.05, divide=divide, skip=skip)


def test_groups_are_those_with_decay_and_without() -> None:
    module = small_model()
    optimizer = own("test_sgd", module)
    names = {id(item.shard): item.name for item in optimizer.shards}
    groups = {
        group["weight_decay"]: {names[id(p)] for p in group["params"]}
        for group in optimizer.optimizer.param_groups
    }
    assert groups == {0.1: {"proj.weight"}, 0.0: {"proj.bias", "norm.weight", "norm.bias"}}


class Odd(torch.optim.Optimizer):
    """Keeps something where no checkpoint finds it."""

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig, what: str) -> None:
        super().__init__(groups, {"lr": config.lr, "k": 0})
        self.what = what

    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        first = self.param_groups[0]["params"][0]
        self.state[first]["a"] = "words" if self.what == "words" else 1
        if self.what == "group":
            self.param_groups[0]["k"] += 1
        if self.what == "nobody's":
            self.state["all"] = 1


REFUSED = {
    "rate": (
        lambda groups, _: torch.optim.SGD(groups, lr=1e-3),
        "one of its groups has the rate 0.001, optim.lr is 0.1",
    ),
    "some": (
        lambda groups, config: torch.optim.SGD(groups[:1], lr=config.lr),
        "it holds 1 parameters of the 4 that it was given",
    ),
    "none": (lambda _groups, _config: None, "its factory returned NoneType"),
    "factored": (
        lambda groups, config: torch.optim.Adafactor(groups, lr=config.lr),
        "of proj.weight has shape",
    ),
    "words": (lambda groups, config: Odd(groups, config, "words"), "its state 'a' of proj.weight is 'words'"),
    "group": (
        lambda groups, config: Odd(groups, config, "group"),
        "its group setting 'k' changes from step to step",
    ),
    "nobodys": (
        lambda groups, config: Odd(groups, config, "nobody's"),
        "it keeps state that belongs to no parameter",
    ),
}
for name, (factory, _) in REFUSED.items():
    ht.register("optimizer", f"test_{name}")(factory)


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_not_be_trained_or_saved_everywhere_is_refused(name: str) -> None:
    module = small_model()
    with pytest.raises(ht.UserError) as error:
        stepped(own(f"test_{name}", module), module, seed=0)
    assert str(error.value).startswith(f"optim.kind=test_{name}: ")
    assert REFUSED[name][1] in str(error.value)
