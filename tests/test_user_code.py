"""Mistakes in a program's own rows, loss, callbacks and factories: each is refused by name,
or cannot go wrong."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hybridtrain as ht
from hybridtrain import registry
from hybridtrain.data.user_rows import UserRows
from hybridtrain.engine.common import global_counts
from hybridtrain.optim import user_optimizer
from hybridtrain.parity.measure import Differences
from hybridtrain.tasks.head import Head
from hybridtrain.tasks.linear_cross_entropy import HeadGradient
from hybridtrain.training.callbacks import check_callbacks
from hybridtrain.types import Batch
from tests.ranks import run_ranks
from tests.runs import summary
from tests.user_rows import Numbers, config_of

# -- the loss ------------------------------------------------------------------------------------------------


class Twice(ht.CausalLM):
    """A weighted loss as one writes it first: two parts under one name."""

    def loss(self, hidden_BTD: torch.Tensor, batch: Batch, head: Head) -> dict[str, torch.Tensor]:
        parts = [self.cross_entropy(hidden_BTD, batch.labels_BT, head, name="loss") for _ in range(2)]
        return {"loss": parts[0] + 0.25 * parts[1]}


def test_a_sum_takes_one_loss_alone() -> None:
    head = Head(torch.nn.Linear(4, 8, bias=False), scale=1.0, cap=None, task=Twice(), loss_chunk=0)
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(
        TypeError,
        match=r"Twice.loss: cross_entropy is called a second time for the sum 'loss'; give each part a name",
    ):
        head(torch.randn(1, 3, 4), Batch(ids, ids, ids))


@pytest.mark.parametrize(("factors", "right"), [((2.0, 2.0, 2.0), True), ((2.0, 3.0, 2.0), False)])
def test_micro_batches_in_flight_have_one_factor_or_no_gradient(
    factors: tuple[float, ...], right: bool
) -> None:
    """Two forward passes, a backward pass, a third forward pass, two backward passes: 1F1B on two stages."""
    gradient, parts = HeadGradient(), [torch.full((2, 2), float(number)) for number in (1, 10, 100)]
    whole = torch.zeros(2, 2)
    for event in ("forward 0", "forward 1", "backward 0", "forward 2", "backward 1", "backward 2"):
        kind, number = event.split()
        if kind == "forward":
            gradient.in_flight += 1
            gradient.add(parts[int(number)].clone(), alone=True)
        else:
            whole += gradient.take(
                torch.tensor(factors[int(number)]), shape=torch.Size((2, 2)), dtype=torch.float32
            )
    assert whole.isnan().all() if not right else torch.equal(whole, torch.full((2, 2), 222.0))
    gradient.in_flight += 1
    gradient.add(parts[0].clone(), alone=True)
    assert torch.equal(
        gradient.take(torch.tensor(5.0), shape=torch.Size((2, 2)), dtype=torch.float32), 5 * parts[0]
    )


class Evaluates(ht.CausalLM):
    """Returns from an evaluation what it is told to."""

    found: Any = 1.0
    name = "eval_loss"

    def evaluate(self, sums: Any) -> dict[str, Any]:  # noqa: ARG002
        return {self.name: self.found}


def evaluated(run: Path, name: str, found: Any) -> str:
    task = Evaluates()
    task.name, task.found = name, found
    try:
        ht.Trainer(
            config_of(run, "train.eval_every=2"),
            data=Numbers(100, first=0),
            eval_data=Numbers(4, first=3),
            task=task,
        ).fit()
    except ht.UserError as error:
        return str(error)
    return (run / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("name", "found", "words"),
    [
        ("step", 7, "task=Evaluates: evaluate returned step=7: a line has this key itself"),
        ("eval_loss", [1.0], "task=Evaluates: evaluate returned eval_loss=[1.0]: not a number"),
        ("eval_loss", torch.tensor(0.5), '"eval_loss": 0.5'),
        ("eval_loss", np.float32(0.5), '"eval_loss": 0.5'),
    ],
)
def test_what_an_evaluation_returns_is_a_number_under_a_name_of_its_own(
    tmp_path: Path, name: str, found: Any, words: str
) -> None:
    assert words in run_ranks(1, evaluated, tmp_path / "run", name, found)[0]


def test_nan_is_the_largest_difference() -> None:
    differences = Differences()
    for name, value in (("a", 1e-3), ("b", math.nan), ("c", 1e-9)):
        differences.add(name, value)
    assert (differences.name, math.isnan(differences.largest)) == ("b", True)


# -- rows ----------------------------------------------------------------------------------------------------


class Table:
    """Columns by name, as a data frame has them."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, name: str) -> list[int]:
        return {"ids": [1, 2, 3]}[name]


def rows_of(data: Any) -> UserRows:
    return UserRows(data, split="train", field="data")


@pytest.mark.parametrize(
    ("row", "ids", "mask"),
    [
        ({"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0]}, [5, 6], None),
        (
            {"input_ids": [0, 0, 5, 6], "attention_mask": [0, 0, 1, 1], "labels": [-100, -100, -100, 6]},
            [5, 6],
            [False, True],
        ),
        (
            {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "loss_mask": [0, 1, 1]},
            [5, 6, 7],
            [False, True, True],
        ),
        ({"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0], "label": 1}, [5, 6, 1], [False, False, True]),
    ],
)
def test_what_a_tokenizer_has_padded_is_not_trained_on(
    row: dict[str, Any], ids: list[int], mask: list[bool] | None
) -> None:
    found, loss_mask = rows_of([row]).read(0)
    assert found.tolist() == ids
    assert (None if loss_mask is None else loss_mask.tolist()) == mask


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([{"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}], "its attention_mask is list [1, 0, 1]"),
        (
            [{"input_ids": [5, 6, 7], "attention_mask": [1, 1]}],
            "it has 3 tokens, and its attention_mask is list [1, 1]",
        ),
        ({"train": [[1, 2]], "test": [[1, 2]]}, "data=dict: it is a mapping of train, test"),
        (Table(), "[0] raises KeyError: 0"),
    ],
)
def test_data_of_another_shape_is_refused(data: Any, words: str) -> None:
    with pytest.raises(ht.UserError) as refused:
        rows_of(data).read(0)
    assert words in str(refused.value)


def test_the_same_tokens_in_other_rows_are_other_data() -> None:
    assert rows_of([[1, 2], [3, 4, 5]]).fingerprint != rows_of([[1, 2, 3], [4, 5]]).fingerprint


def trained_on(run: Path, sizes: list[int]) -> str:
    """On each rank: held-out rows of another number."""
    held_out = Numbers(sizes[int(os.environ["RANK"])], first=3)
    try:
        return (
            ht.Trainer(
                config_of(run, "parallel=ddp", "train.eval_every=2"),
                data=Numbers(100, first=0),
                eval_data=held_out,
            )
            .fit()
            .status
        )
    except ht.UserError as error:
        return str(error)
    except SystemExit as error:
        return f"exit {error.code}"


def test_held_out_rows_that_ranks_do_not_share_are_refused(tmp_path: Path) -> None:
    refused, other = run_ranks(2, trained_on, tmp_path / "run", [4, 40])
    assert "evaluation data (fingerprint)" in refused
    assert other == "exit 2"


# -- a run ---------------------------------------------------------------------------------------------------


class Enough(ht.Callback):
    def on_step(self, run: ht.Run, metrics: Any) -> None:  # noqa: ARG002
        if run.step == 2:
            run.stop("good enough")


def stopped(run: Path, *words: str) -> int:
    return ht.Trainer(config_of(run, *words), data=Numbers(100, first=0), callbacks=[Enough()]).fit().step


def test_a_run_that_its_program_ended_is_finished(tmp_path: Path) -> None:
    assert run_ranks(1, stopped, tmp_path / "run") == [3]
    assert run_ranks(1, stopped, tmp_path / "run") == [3]
    assert summary(tmp_path / "run")["exit_reason"] == "good enough"
    assert run_ranks(1, stopped, tmp_path / "run", "train.steps=5") == [5]


def refused_then_trained(run: Path) -> str:
    """A row that is too long for the first steps of a run with a tracker; then rows that fit, in
    the same directory."""
    words = ("tracker.kinds=[tensorboard]", "run.callbacks=[]")
    try:
        ht.Trainer(config_of(run, *words), data=[list(range(40))] * 8).fit()
    except ht.UserError as error:
        left = sorted(path.name for path in run.parent.iterdir())
        result = ht.Trainer(config_of(run, *words), data=Numbers(100, first=0)).fit()
        return f"{error}\n{left} {result.status}"
    return "not refused"


def test_a_refused_run_takes_its_trackers_files_back(tmp_path: Path) -> None:
    [found] = run_ranks(1, refused_then_trained, tmp_path / "run")
    assert "it has 40 tokens" in found
    assert found.endswith("[] finished")


def trained_in_a_thread(run: Path) -> list[str]:
    found: list[str] = []
    thread = threading.Thread(
        target=lambda: found.append(ht.Trainer(config_of(run), data=Numbers(100, first=0)).fit().status)
    )
    thread.start()
    thread.join()
    return found


def test_a_program_may_train_in_a_thread(tmp_path: Path) -> None:
    assert run_ranks(1, trained_in_a_thread, tmp_path / "run") == [["finished"]]
    assert "none stops this run with a checkpoint" in (tmp_path / "run/logs/rank-0.log").read_text()


# -- factories -----------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_entries", {})


@pytest.mark.usefixtures("fresh")
def test_what_a_factory_raises_is_a_refusal_with_its_place() -> None:
    ht.register("optimizer", "mine")(
        lambda groups, config: torch.optim.SGD(groups, lr=config.lr, momentum=config.options["momentum"])
    )
    settings = ht.compose("model=tiny").optim
    settings.kind = "mine"
    with pytest.raises(
        ht.UserError,
        match=r"optim.kind=mine: it raised KeyError: 'momentum' \(.*test_user_code.py:\d+\)",
    ):
        user_optimizer.build([{"params": [torch.nn.Parameter(torch.zeros(2))]}], settings)


@pytest.mark.usefixtures("fresh")
def test_a_rate_in_a_tensor_is_the_rate() -> None:
    ht.register("optimizer", "mine")(
        lambda groups, config: torch.optim.AdamW(groups, lr=torch.tensor(config.lr))
    )
    settings = ht.compose("model=tiny", "optim.lr=0.0003").optim
    settings.kind = "mine"
    assert user_optimizer.build([{"params": [torch.nn.Parameter(torch.zeros(2))]}], settings).param_groups


@pytest.mark.usefixtures("fresh")
def test_a_cell_of_a_notebook_may_be_run_again() -> None:
    cell = "import hybridtrain as ht\n@ht.register('callback', 'mine')\nclass Mine(ht.Callback): pass\n"
    for number in (1, 2):
        exec(compile(cell, f"<cell {number}>", "exec"), {"__name__": "__main__"})
    with pytest.raises(ht.UserError, match="registered twice"):
        exec(compile(cell.replace("Mine", "Other"), "<cell 3>", "exec"), {"__name__": "__main__"})


def test_one_layout_may_be_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = ht.parity(
        ht.compose("model=tiny", "data.seq_len=16", "batch.global_batch_size=2"), layouts="single", steps=1
    )
    assert [row.layout for row in found.rows] == ["single"]
    assert json.loads(found.path.read_text())


# -- arguments of the Trainer -----------------------------------------------------------------------------


class Loss(ht.Callback):
    def on_evaluation(self, run: ht.Run, metrics: Any) -> None:
        """A method that no run calls."""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"callbacks": [Loss]}, "callbacks[0]=Loss: it is a class"),
        ({"callbacks": [Loss(), Table()]}, "callbacks[1]=Table: it does not inherit ht.Callback"),
        ({"task": ht.CausalLM}, "task=CausalLM: it is a class"),
        ({"data": [{"text": "a"}]}, "row 0: it has text, and no input_ids"),
        ({"data": [{"input_ids": [1, 2], "label": 1}]}, "rows of list have a class number as `label`"),
    ],
)
def test_what_is_no_argument_is_refused_at_once(tmp_path: Path, arguments: Any, message: str) -> None:
    with pytest.raises(ht.UserError) as refused:
        ht.Trainer(config_of(tmp_path / "run"), **{"data": [[1, 2]], **arguments}).fit()
    assert message in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_method_that_no_run_calls_is_warned_of(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr(logging.getLogger("hybridtrain"), "propagate", True)
    check_callbacks([Loss()])
    assert "no run calls Loss.on_evaluation; there is on_evaluate" in caplog.text


class Uncounted(ht.CausalLM):
    weights = {"lm": 1.0}  # noqa: RUF012


def test_a_task_without_a_count_for_a_sum_is_named() -> None:
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"Uncounted.counts: the sum 'lm' is missing"):
        global_counts([Batch(ids, ids, ids)], task=Uncounted(), mesh=None, flags=None)  # type: ignore[arg-type]
