"""The seam of tasks: one with two sums of unlike weights and counts trains, in every kind of layout and on
both engines, as the plain process does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hybridtrain.data.rows import Block
from hybridtrain.models.build import hf_config
from hybridtrain.models.init import draw
from hybridtrain.parallel.mesh import connect
from hybridtrain.plan import layout as layouts
from hybridtrain.plan.batch import plan_batch
from hybridtrain.reference import Reference
from hybridtrain.tasks.causal_lm import CausalLM
from hybridtrain.tasks.head import Head
from hybridtrain.types import IGNORE_INDEX, Batch, Sums
from tests.cases import Case, deepspeed, model, whole
from tests.ranks import run_ranks

TIED = model(tie_word_embeddings=True)


class Halves(CausalLM):
    """The tokens of the first half of a row and those of the second: two means, one counts a quarter."""

    weights = {"first": 1.0, "second": 0.25}  # noqa: RUF012

    def _labels(self, batch: Batch) -> dict[str, torch.Tensor]:
        second = (
            torch.arange(batch.labels_BT.shape[1], device=batch.labels_BT.device)
            >= batch.labels_BT.shape[1] // 2
        )
        return {
            "first": batch.labels_BT.masked_fill(second, IGNORE_INDEX),
            "second": batch.labels_BT.masked_fill(~second, IGNORE_INDEX),
        }

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {name: (labels != IGNORE_INDEX).sum() for name, labels in self._labels(batch).items()}

    def loss(self, hidden_BTD: torch.Tensor, batch: Batch, head: Any) -> dict[str, torch.Tensor]:
        return {
            name: self.cross_entropy(hidden_BTD, labels, head, name=name)
            for name, labels in self._labels(batch).items()
        }

    def loss_of_logits(self, logits_BTV: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        return {
            name: self.cross_entropy_of_logits(logits_BTV, labels)
            for name, labels in self._labels(batch).items()
        }


def trained(case: Case) -> tuple[list[tuple[float, float]], Sums, dict[str, torch.Tensor]]:
    """Losses and gradient norms, an evaluation, and this rank's parameters."""
    config = case.config()
    layout = layouts.resolve(config.parallel, world_size=case.world_size)
    plan = plan_batch(config.batch, layout=layout, seq_len=case.seq_len)
    device = torch.device("cpu")
    connect(device, timeout_s=120)
    if config.engine.kind == "deepspeed":
        from hybridtrain.engine.deepspeed import DeepSpeedEngine as Engine
    else:
        from hybridtrain.engine.torch_native import TorchEngine as Engine
    engine: Any = Engine(config, layout=layout, plan=plan, device=device, initial=True, task=Halves())
    results = [
        engine.train_step(case.batches(step, dp_rank=engine.mesh.dp_rank, dp=layout.dp), lr=case.lr)
        for step in range(case.steps)
    ]
    sums = engine.eval_step(case.batches(0, dp_rank=engine.mesh.dp_rank, dp=layout.dp))
    return (
        [(float(result.loss), float(result.grad_norm)) for result in results],
        sums,
        {name: whole(value) for name, value in engine.weights()},
    )


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case("dp_shard2"),
        Case("tp2"),
        Case("pp2", TIED),
        Case("pp2-gpipe"),
        Case("pp2-tp2"),
        deepspeed("dp_shard2"),
        deepspeed("pp2"),
    ],
    ids=lambda case: f"{dict(case.overrides).get('engine.kind', 'torch')}-{case.layout}",
)
def test_a_task_with_two_sums_trains_as_the_plain_process_does(case):
    config = case.config()
    built = hf_config(case.fields, chosen={}, attention=config.model.attention)
    source, task = draw(built, seed=config.run.seed), Halves()
    plain = Reference(
        built,
        source=source,
        settings=config.optim,
        precision=config.precision,
        seed=0,
        freeze=(),
        adapters=config.adapters,
        task=task,
    )
    steps = [plain.step(case.batches(step, dp_rank=0, dp=1), lr=case.lr) for step in range(case.steps)]
    counts = [task.counts(batch) for batch in case.batches(0, dp_rank=0, dp=1)]
    for found, sums, parameters in run_ranks(case.world_size, trained, case):
        assert found == [pytest.approx((step.loss, step.grad_norm), rel=1e-5) for step in steps]
        assert sums.counts == {name: sum(int(count[name]) for count in counts) for name in task.weights}
        assert sums.counts["first"] != sums.counts["second"]
        for name, value in parameters.items():
            assert float((value - plain.parameters()[name]).abs().max()) < 0.05 * case.lr * case.steps, name


def test_rows_become_inputs_and_the_labels_that_follow():
    """No label where a document begins, where a token carries no loss, nor in rows that only fill up."""
    tokens = np.arange(10, 22).reshape(2, 6)
    begins, carries = np.zeros((2, 6), dtype=bool), np.ones((2, 6), dtype=bool)
    begins[0, [0, 3]], carries[0, 5] = True, False
    batch = CausalLM().collate(Block(tokens, begins, carries), valid=1)
    assert batch.packed
    assert batch.input_ids_BT.tolist() == [[10, 11, 12, 13, 14], [16, 17, 18, 19, 20]]
    assert batch.labels_BT.tolist() == [[11, 12, IGNORE_INDEX, 14, IGNORE_INDEX], [IGNORE_INDEX] * 5]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]


def test_an_evaluation_is_a_mean_over_all_of_its_steps():
    total = Sums({"loss": 6.0}, {"loss": 2}) + Sums({"loss": 2.0}, {"loss": 6})
    assert CausalLM().evaluate(total) == {"eval_loss": 1.0}


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ({"first": torch.zeros(1)}, "'second' is missing"),
        ({"first": torch.zeros(()), "second": torch.zeros(1)}, r"'first' has shape \(\)"),
    ],
)
def test_sums_that_a_task_gets_wrong_are_named(returned, said, monkeypatch):
    task = Halves()
    monkeypatch.setattr(task, "loss", lambda *_: returned)
    with pytest.raises(TypeError, match=rf"Halves\.loss: the sum {said}"):
        Head(torch.nn.Linear(4, 8, bias=False), scale=1.0, cap=None, task=task, loss_chunk=0)(None, None)
