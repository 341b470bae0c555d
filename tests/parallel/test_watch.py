"""What a watcher sees of a step is the same under every layout, and the step is the same as without."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from hybridtrain.parallel.watch import Call
from tests import cases
from tests.cases import Case
from tests.ranks import run_ranks

Key = tuple[int, str, str]
"""(micro-batch, module, what)."""


COMPILED = (("engine.compile", True), ("engine.compile_backend", "aot_eager"))


class Sums:
    """The sums of squares of all that a rank computes."""

    inputs = True

    def __init__(self) -> None:
        self.seen: Counter[Key] = Counter()
        self.norms: dict[Key, float] = {}

    def _add(self, call: Call, what: str, tensors: Sequence[torch.Tensor]) -> None:
        for place, tensor in enumerate(tensors):
            key = (call.micro_batch, call.name, f"{what}{place}")
            self.seen[key] += 1
            self.norms[key] = self.norms.get(key, 0.0) + float(tensor.double().square().sum())

    def forward(self, call: Call, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        self._add(call, "x", inputs)
        self._add(call, "y", outputs)

    def output_gradient(self, call: Call, gradient: torch.Tensor) -> None:
        self._add(call, "g", [gradient])

    def input_gradient(self, call: Call, gradient: torch.Tensor) -> None:
        self._add(call, "dx", [gradient])

    def parameter_gradient(self, call: Call, gradient: torch.Tensor) -> None:
        self._add(call, "dw", [gradient])

    def row_losses(self, call: Call, sums: torch.Tensor) -> None:
        self._add(call, "rows", [sums])


def wrapped(engine: Any) -> list[tuple[str, Any]]:
    return [(name, vars(module).get("forward")) for name, module in engine.modules()]


def watch(case: Case) -> tuple[Counter[Key], dict[Key, float], list[float]]:
    torch.manual_seed(0)
    engine, watcher, norms = cases.start(case), Sums(), []
    before = wrapped(engine)
    for step in range(3):
        batches = case.batches(step, dp_rank=engine.mesh.dp_rank, dp=engine.layout.dp)
        if step == 1:
            with engine.watching(watcher):
                norms.append(float(engine.train_step(batches, lr=case.lr).grad_norm))
        else:
            norms.append(float(engine.train_step(batches, lr=case.lr).grad_norm))
    assert wrapped(engine) == before
    return watcher.seen, watcher.norms, norms


def merged(case: Case) -> tuple[Counter[Key], dict[Key, float], list[float]]:
    seen: Counter[Key] = Counter()
    values: dict[Key, float] = {}
    results = run_ranks(case.world_size, watch, case)
    for of_rank, numbers, _ in results:
        seen |= of_rank
        values |= numbers
    return seen, values, results[0][2]


def check(layout: str, *overrides: tuple[str, Any]) -> None:
    plain, case = Case("single", lr=0.0), Case(layout, lr=0.0, overrides=overrides)
    seen, values, norms = merged(case)
    expected, numbers, norms_there = merged(plain)
    every_stage = {key for key in expected if "rotary" in key[1]}  # its input is only looked at for its dtype
    assert {key: times for key, times in seen.items() if key not in every_stage} == {
        key: times for key, times in expected.items() if key not in every_stage
    }
    of_attention = {key for key in seen if key[1].endswith("attention") and key[2] == "dx0"}
    assert {key for key, times in expected.items() if times != 1} == of_attention  # query, key and value
    assert norms == pytest.approx(norms_there, rel=1e-5)
    if "tp" not in layout:
        assert {key: value for key, value in values.items() if key not in every_stage} == {
            key: pytest.approx(value, rel=1e-4) for key, value in numbers.items() if key not in every_stage
        }


def test_a_split_backward_pass_shows_every_gradient_once() -> None:
    check("pp2-zbv_zero_bubble")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "overrides"),
    [
        ("single", (("recompute.kind", "full"),)),
        ("single", (("recompute.kind", "selective"),)),
        ("pp2", (("recompute.kind", "selective"),)),
        ("tp2", (("recompute.kind", "full"),)),
        ("pp2-tp2", ()),
        ("single", COMPILED),
        ("pp2", (*COMPILED, ("recompute.kind", "selective"))),
    ],
)
def test_every_call_is_seen_once(layout: str, overrides: tuple[tuple[str, Any], ...]) -> None:
    check(layout, *overrides)


@pytest.mark.slow
def test_attention_and_loss_are_watched() -> None:
    seen, _, _ = merged(dataclasses.replace(Case("single"), steps=1))
    names = {name for _, name, _ in seen}
    assert {"model.layers.0.self_attn.attention", "lm_head", "model.layers.3.mlp.act_fn"} <= names
