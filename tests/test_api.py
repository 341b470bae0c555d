"""Training from a program: its own rows, its own callbacks, under every layout, resumed and
exported as any run is."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import hybridtrain as ht
from tests.ranks import RankFailed, run_ranks
from tests.runs import assert_equal_state, rows, summary
from tests.tasks.test_tasks import Halves
from tests.user_rows import SEQ, VOCAB, Numbers, config_of

ROOT = Path(__file__).resolve().parent.parent


class Noted(ht.Callback):
    """Writes down what is called; ends or breaks the run where it is told to, on the last rank alone."""

    def __init__(self, *, stop_at: int = 0, break_at: int = 0) -> None:
        self.calls: list[Any] = []
        self.steps: list[float] = []
        self.stop_at, self.break_at = stop_at, break_at

    def on_start(self, run: ht.Run) -> None:
        self.calls.append(("start", run.step, len(list(run.engine.weights())) > 0))

    def on_every_step(self, run: ht.Run, info: ht.StepInfo) -> None:
        assert (run.step, run.tokens_seen) == (info.step, info.tokens_seen)
        self.steps.append(float(info.result.loss))

    def on_step(self, run: ht.Run, metrics: Mapping[str, Any]) -> None:
        self.calls.append(("step", run.step, metrics["loss"]))
        mine = dist.get_rank() == dist.get_world_size() - 1
        if mine and run.step == self.stop_at:
            run.stop("enough")
        if mine and run.step == self.break_at:
            raise ZeroDivisionError("planted")

    def on_evaluate(self, run: ht.Run, metrics: Mapping[str, float]) -> None:
        self.calls.append(("evaluate", run.step, metrics["eval_loss"]))

    def on_checkpoint(self, run: ht.Run, path: Path) -> None:
        assert (path / "complete.json").is_file()
        assert path.parent == run.dir / "checkpoints"
        self.calls.append(("checkpoint", path.name))

    def on_end(self, run: ht.Run, error: BaseException | None) -> None:
        self.calls.append(("end", run.step, type(error).__name__))


def trained(run: Path, words: list[str], stop_at: int, break_at: int) -> tuple[ht.Result, list[Any]]:
    """On each rank: train on Numbers; how it ended, and what the callback was told."""
    noted = Noted(stop_at=stop_at, break_at=break_at)
    trainer = ht.Trainer(
        config_of(run, *words), data=Numbers(100, first=0), eval_data=Numbers(12, first=3), callbacks=[noted]
    )
    return trainer.fit(), noted.calls


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """One process, six steps, evaluated every third, saved after the third."""
    run = tmp_path_factory.mktemp("alone") / "run"
    [(result, calls)] = run_ranks(
        1, trained, run, ["train.eval_every=3", "checkpoint.every=3", "checkpoint.asynchronous=false"], 0, 0
    )
    assert (result.run_dir, result.status, result.step, result.tokens_seen) == (
        run,
        "finished",
        6,
        6 * 4 * SEQ,
    )
    return run, calls


def test_callbacks_see_the_run(alone: tuple[Path, list[Any]]) -> None:
    run, calls = alone
    assert [call[:2] for call in calls] == [
        *(
            ("start", 0),
            ("step", 1),
            ("step", 2),
            ("evaluate", 3),
            ("step", 3),
            ("step", 4),
            ("step", 5),
            ("checkpoint", "step-00000003"),
        ),
        *(("evaluate", 6), ("step", 6), ("checkpoint", "step-00000006"), ("end", 6)),
    ]
    lines = rows(run)
    assert [call[2] for call in calls if call[0] == "step"] == [line["loss"] for line in lines]
    assert [call[2] for call in calls if call[0] == "evaluate"] == [
        line["eval_loss"] for line in lines if "eval_loss" in line
    ]
    assert lines[5]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize(
    "layout",
    ["tp2", pytest.param("pp2", marks=pytest.mark.slow), pytest.param("zero3", marks=pytest.mark.slow)],
)
def test_the_rows_are_the_same_under_another_layout(
    alone: tuple[Path, list[Any]], tmp_path: Path, layout: str
) -> None:
    ended = run_ranks(
        2,
        trained,
        tmp_path / "run",
        [f"parallel={layout}", "train.eval_every=3", "checkpoint.every=3", "checkpoint.asynchronous=false"],
        0,
        0,
    )
    assert ended[0][1] == ended[1][1], "every rank is told the same"
    for here, there in zip(rows(tmp_path / "run"), rows(alone[0]), strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-4)  # six steps let rounding errors grow
        assert here["tokens_seen"] == there["tokens_seen"]


def test_it_goes_on_bit_for_bit_and_the_command_line_cannot_take_it_over(
    alone: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    words = ["train.eval_every=3", "checkpoint.every=3", "checkpoint.asynchronous=false"]
    [(_, first)] = run_ranks(1, trained, tmp_path / "run", [*words, "train.steps=4"], 0, 0)
    [(_, then)] = run_ranks(1, trained, tmp_path / "run", words, 0, 0)
    assert (first[-1][1], then[0][1]) == (4, 4)
    assert [line["loss"] for line in rows(tmp_path / "run")] == [line["loss"] for line in rows(alone[0])]
    assert_equal_state(
        tmp_path / "run" / "checkpoints" / "step-00000006", alone[0] / "checkpoints" / "step-00000006"
    )
    [(again, calls)] = run_ranks(1, trained, tmp_path / "run", words, 0, 0)
    assert (again.status, again.step, calls) == ("finished", 6, [])


def other_length(run: Path) -> str:
    try:
        ht.Trainer(config_of(run, "train.steps=8"), data=Numbers(101, first=0)).fit()
    except ht.UserError as error:
        return str(error)
    return ""


def test_other_rows_are_refused_when_it_goes_on(alone: tuple[Path, list[Any]]) -> None:
    [said] = run_ranks(1, other_length, alone[0])
    assert said.startswith("run.dir=") or said.startswith("data")
    assert "allow_data_change" in said


def test_one_rank_that_asks_stops_all_with_a_checkpoint(tmp_path: Path) -> None:
    ended = run_ranks(2, trained, tmp_path / "run", [], 2, 0)
    assert {result.step for result, _ in ended} == {3}
    assert [call[0] for call in ended[0][1]][-2:] == ["checkpoint", "end"]
    told = summary(tmp_path / "run")
    assert (told["status"], told["exit_reason"]) == ("finished", "a callback of another rank asked for it")


def test_a_callback_that_raises_ends_the_run_and_the_report_names_the_rank(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="planted"):
        run_ranks(2, trained, tmp_path / "run", [], 0, 2)
    told = summary(tmp_path / "run")
    assert told["status"] == "failed"
    assert "rank 1" in told["exit_reason"]
    assert "ZeroDivisionError" in told["exit_reason"]


class Uneven(ht.Callback):
    """Adds up something on rank 0 alone."""

    def on_step(self, run: ht.Run, metrics: Mapping[str, Any]) -> None:  # noqa: ARG002
        if dist.get_rank() == 0 and run.step == 2:
            dist.all_reduce(torch.zeros(1))


def trained_unevenly(run: Path) -> None:
    ht.Trainer(
        config_of(run, "parallel=ddp", "engine.timeout_s=5"), data=Numbers(100, first=0), callbacks=[Uneven()]
    ).fit()


def test_a_collective_on_one_rank_alone_is_a_timeout_that_names_the_callback(tmp_path: Path) -> None:
    with pytest.raises(RankFailed):
        run_ranks(2, trained_unevenly, tmp_path / "run")
    reason = str(summary(tmp_path / "run")["exit_reason"])
    assert (
        "CallbackTimeout: Uneven.on_step waited for the other ranks until engine.timeout_s=5 had passed"
        in reason
    )
    assert [line["step"] for line in rows(tmp_path / "run")] == [1, 2]
    [report] = (tmp_path / "run" / "failures").glob("*/rank-0.json")
    assert "dist.all_reduce(torch.zeros(1))" in json.loads(report.read_text())["traceback"]


def trained_in_halves(run: Path, words: list[str], own: bool) -> str:
    """On each rank: train with a task of two sums, or go on without it; how it ended, or the
    first line of a refusal."""
    task = Halves() if own else None
    try:
        return ht.Trainer(config_of(run, *words), data=Numbers(100, first=0), task=task).fit().status
    except ht.UserError as error:
        return str(error).splitlines()[0]


def test_an_own_loss_is_trained_under_every_layout_and_is_part_of_what_the_run_is(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_ranks(1, trained_in_halves, one, ["optim.lr=0.001"], True) == ["finished"]
    assert run_ranks(2, trained_in_halves, two, ["optim.lr=0.001", "parallel=tp2"], True) == ["finished"] * 2
    for here, there in zip(rows(two), rows(one), strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)
        assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=1e-5)
        assert here["loss"] == pytest.approx(here["train_first"] + 0.25 * here["train_second"], rel=1e-6)
        assert {key: here[key] for key in ("train_first", "train_second")} == pytest.approx(
            {key: there[key] for key in ("train_first", "train_second")}, rel=1e-5
        )
    refused = (
        "task=next-token prediction: the checkpoint of step 6 "
        "was trained with Halves {'first': 1.0, 'second': 0.25}"
    )
    assert run_ranks(1, trained_in_halves, one, ["optim.lr=0.001", "train.steps=8"], False) == [refused]
    assert run_ranks(1, trained_in_halves, one, ["optim.lr=0.001", "train.steps=8"], True) == ["finished"]


def test_an_export_of_it_is_a_hugging_face_folder(alone: tuple[Path, list[Any]], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for _ in range(2):  # the name stays the function's once the folder of that name is imported
        folder = ht.export(alone[0], out=tmp_path / "out", dtype="bfloat16")
    assert folder == tmp_path / "out"
    assert callable(importlib.import_module("hybridtrain").export)
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == VOCAB


@pytest.mark.parametrize(
    ("words", "parts", "field"),
    [
        (["train.eval_every=2"], {"data": [[1, 2]]}, "train.eval_every=2"),
        ([], {"eval_data": [[1, 2]]}, "eval_data=list"),
        ([], {}, "data.path=''"),
        (["optim.lr=-1"], {"data": [[1, 2]]}, "optim.lr=-1.0"),
        (
            ["task.z_loss=1e-4"],
            {"data": [[1, 2]], "task": Halves()},
            "task.z_loss=0.0001: a task is given as `task`, Halves",
        ),
        (
            ["task=classification"],
            {"data": [[1, 2]], "task": Halves()},
            "task.kind=classification: a task is given",
        ),
        (
            [],
            {"data": [[1, 2]], "task": 5},
            "task=int: it has no collate, counts, loss, loss_of_logits, evaluate, weights",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_written(
    tmp_path: Path, words: list[str], parts: dict[str, Any], field: str
) -> None:
    with pytest.raises(ht.UserError, match="allowed") as error:
        ht.Trainer(config_of(tmp_path / "run", *words), **parts).fit()
    assert str(error.value).startswith(field)
    assert not (tmp_path / "run").exists()


def test_importing_it_takes_no_torch() -> None:
    code = (
        "import sys, hybridtrain as ht; ht.compose('model=tiny'); ht.UserError; "
        "print('torch' in sys.modules, sorted(ht.__all__) == ht.__all__)"
    )
    assert subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split() == ["False", "True"]
    with pytest.raises(AttributeError, match="it has Callback, CausalLM"):
        ht.Trianer  # noqa: B018


SCRIPT = """
import sys
import hybridtrain as ht

class Rows:
    def __len__(self): return 40
    def row(self, index): return [(index + n * n) % 250 for n in range(33)]

class Stopper(ht.Callback):
    def on_step(self, run, metrics):
        if metrics["loss"] < 5.6: run.stop("good enough")

if __name__ == "__main__":
    config = ht.compose(
        "model=tiny", "data.seq_len=32", "batch.global_batch_size=8", "batch.micro_batch_size=1",
        "train.steps=50", "train.log_every=1", "schedule=constant", "optim.lr=0.01", *sys.argv[1:]
    )
    result = ht.Trainer(config, data=Rows(), callbacks=[Stopper()]).fit()
    sys.stdout.write(result.status + "\\n")  # in one piece: the ranks share a pipe
"""


@pytest.mark.parametrize(
    "layout", [pytest.param("tp2_pp2", marks=pytest.mark.slow), pytest.param("zero3", marks=pytest.mark.slow)]
)
def test_a_script_outside_the_checkout_under_torchrun(tmp_path: Path, layout: str) -> None:
    (tmp_path / "mine.py").write_text(SCRIPT)
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    alone = subprocess.run(
        [sys.executable, "mine.py", "run.dir=one"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert alone.stdout.splitlines()[-1] == "finished"
    number = {"tp2_pp2": 4, "zero3": 2}[layout]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(number),
    ]
    done = subprocess.run(
        [*launcher, "mine.py", "run.dir=several", f"parallel={layout}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines().count("finished") == number
    assert json.loads((tmp_path / "several" / "summary.json").read_text())["exit_reason"] == "good enough"
    for here, there in zip(rows(tmp_path / "several"), rows(tmp_path / "one"), strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)
    refused = subprocess.run(
        [*launcher, "mine.py", "run.dir=more", "train.steps=0"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 1
    assert refused.stderr.count("UserError: train=all 0: the run has no end") == 1


@pytest.mark.slow
def test_the_programs_of_the_documentation_run(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    (tmp_path / "mine.py").write_text(blocks[0])
    done = subprocess.run(
        [sys.executable, "mine.py"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert done[-1].startswith("finished ")
    told = summary(tmp_path / "runs" / "multiples")
    assert (told["exit_reason"], told["steps"] < 60) == ("good enough", True)
    subprocess.run(
        [sys.executable, "-c", blocks[1]], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert (tmp_path / "runs" / "multiples" / "export" / "model.safetensors").is_file()
