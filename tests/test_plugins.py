"""What a user's own module adds by name: each kind in a run, its refusals; parity of own task and rows."""

from __future__ import annotations

import importlib
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import hybridtrain as ht
from hybridtrain import registry
from hybridtrain.config import checks, compose, schema
from tests.plugins import PLANTED, files_of_the_documentation, fresh, in_folder  # noqa: F401 - a fixture
from tests.ranks import run_ranks
from tests.runs import checkpoints, four_parts, rows, summary
from tests.tasks.test_tasks import Halves


def test_each_kind_of_the_documentation_trains(tmp_path: Path) -> None:
    lines = files_of_the_documentation(tmp_path)
    train = [shlex.split(line)[2:] for line in lines if line.startswith("hybridtrain train ")]
    assert [len(lines), len(train)] == [8, 7]
    for argv in train:
        [ended] = run_ranks(1, in_folder, tmp_path, "train", argv)
        assert ended.code == 0, ended.err
    runs = {
        name: rows(tmp_path / "runs" / name)
        for name in ("mine", "steps", "stopper", "halves", "focal", "rmsprop", "table")
    }
    plain = runs["mine"]
    assert plain[-1]["loss"] < plain[0]["loss"]
    assert [line["step"] for line in plain if "eval_loss" in line] == [15, 30]
    assert [line["lr"] for line in runs["steps"]] == pytest.approx([*[0.01] * 3, *[0.005] * 2, *[0.0025] * 2])
    assert summary(tmp_path / "runs/stopper")["exit_reason"] == "good enough"
    assert (
        len(
            {
                run[-1]["loss"]
                for run in (plain, runs["steps"], runs["halves"], runs["focal"], runs["rmsprop"])
            }
        )
        == 5
    )
    assert [f"{line['step']},{line['loss']}" for line in runs["table"]] == (
        tmp_path / "runs/table/trackers/table/losses.csv"
    ).read_text().split()
    for command, more, code in (
        ("export", [], 0),
        ("evaluate", [], 2),
        ("evaluate", ["run.plugins=[rows]"], 0),
    ):
        [ended] = run_ranks(1, in_folder, tmp_path, command, ["runs/mine", *more])
        assert ended.code == code, ended.err
        assert code == 0 or "run.plugins=[MODULE], with the module that registers multiples" in ended.err
    written = yaml.safe_load((tmp_path / "runs/halves/config.yaml").read_text())
    assert [written["task"]["kind"], written["data"]["kind"], written["run"]["plugins"]] == [
        "halves",
        "multiples",
        ["rows", "halves"],
    ]


@pytest.mark.slow
def test_the_proofs_of_the_documentation_pass(tmp_path: Path) -> None:
    lines = files_of_the_documentation(tmp_path)
    parity = shlex.split(next(line for line in lines if line.startswith("hybridtrain parity ")))[1:]
    here = {"cwd": tmp_path, "capture_output": True, "text": True, "check": False}
    done = subprocess.run([sys.executable, "-m", "hybridtrain.cli", *parity], **here)
    assert (done.returncode, "2 of 2 layouts pass" in done.stdout) == (0, True), done.stdout + done.stderr
    done = subprocess.run([sys.executable, "prove.py"], **here)
    assert done.stdout.splitlines()[-1] == "['dp_shard2-zero3'] True", done.stdout + done.stderr


def test_another_name_is_another_run(tmp_path: Path) -> None:
    """task.kind and data.kind are part of a run's identity; which modules are imported is not, and a run
    goes on with others."""
    files_of_the_documentation(tmp_path)
    argv = ["--config-dir", "conf", "experiment=mine", "run.dir=one", "train.steps=2", "train.eval_every=0"]
    (tmp_path / "planted.py").write_text(PLANTED)
    for more in ([], ["train.steps=4", "run.plugins=[planted,rows]"]):
        [ended] = run_ranks(1, in_folder, tmp_path, "train", [*argv, *more])
        assert ended.code == 0, ended.err
    assert "run.plugins" not in ended.err
    assert checkpoints(tmp_path / "one")[-1] == "step-00000004"
    for words in (
        ["task.kind=halves", "run.plugins=[rows,halves]"],
        ["optim.kind=rmsprop", "run.plugins=[rows,rmsprop]", "optim.options.momentum=0.9"],
    ):
        [ended] = run_ranks(1, in_folder, tmp_path, "train", [*argv, "train.steps=6", *words])
        assert ended.code == 2
        assert f"it holds another run: {words[0].partition('=')[0]} was" in ended.err
    [ended] = run_ranks(
        1,
        in_folder,
        tmp_path,
        "train",
        [*argv, "run.dir=two", "run.branch_from=one", "train.steps=6", *words],
    )
    assert "the checkpoint's optimizer state is that of adamw" in four_parts(ended.err, "optim.kind"), (
        ended.err
    )


def refused(*words: str) -> str:
    """What `hybridtrain train` says before it begins."""
    with pytest.raises(ht.UserError) as error:
        checks.check(ht.compose("model=tiny", "data.path=x", "train.steps=1", *words))
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "it cannot be imported: ModuleNotFoundError: No module named 'mine'\n"),
        (
            "import absent_library",
            "it cannot be imported: ModuleNotFoundError: No module named 'absent_library' ({file}:1)",
        ),
        ("a = 1\nb = 1 / 0\n", "it cannot be imported: ZeroDivisionError: division by zero ({file}:2)"),
        ("a = (", "it cannot be imported: SyntaxError: '(' was never closed ({file}:1)"),
        ("import sys\nsys.exit(3)", "it cannot be imported: SystemExit: 3 ({file}:2)"),
        ("a = 1", "it registers nothing"),
        (
            "import hybridtrain as ht\nht.register('optimiser', 'x')",
            "ht.register=optimiser: no such kind (at {file}:2)",
        ),
        ("import hybridtrain as ht\nht.register('optimizer', 'a b')", "not a name (at {file}:2)"),
        (
            "import hybridtrain as ht\nht.register('optimizer', 'adamw')",
            "hybridtrain has a optimizer of this name itself (at {file}:2)",
        ),
        (
            "import hybridtrain as ht\nht.register('task', 'x')(print)\nht.register('task', 'x')(print)",
            "registered twice: at {file}:2 and at {file}:3",
        ),
    ],
)
def test_a_module_that_does_not_do_is_refused_by_name(text: str | None, said: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    message = four_parts(refused("run.plugins=[mine]"), "run.plugins")
    assert message.startswith("run.plugins=mine: ")
    assert said.format(file=tmp_path / "mine.py") in message
    assert not any(entry.module == "mine" for entry in registry._entries.values())
    (tmp_path / "mine.py").write_text(PLANTED)  # mended, and as long as another name: it is imported anew
    importlib.invalidate_caches()
    sys.modules.pop("mine", None)
    checks.check(
        ht.compose(
            "model=tiny", "data.path=x", "train.steps=1", "run.plugins=[mine]", "schedule.kind=planted"
        )
    )


def test_a_module_is_imported_once_and_a_package_may_register_in_its_parts(tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack/__init__.py").write_text("from pack import part")
    (tmp_path / "pack/part.py").write_text(PLANTED)
    for _ in range(2):
        registry.load(["pack", "pack.part"])
    assert registry.names("schedule") == (*registry.BUILT_IN["schedule"], "planted")
    assert registry.listed() == "schedule planted"
    assert list(registry.sources()) == ["pack.part"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run.plugins=[./mine.py]"], "run.plugins=./mine.py: not the name of a module"),
        (["optim.kind=rmsprop"], "run.plugins=[MODULE], with the module that registers rmsprop"),
        (["task.kind=halves"], "task.kind=halves: not one of the kinds there are"),
        (["data.path=''", "data.kind=mine"], "data.kind=mine: not one"),
        (
            ["run.callbacks=[stopper]"],
            ("run.callbacks=stopper: not one of the kinds there are\n  allowed: lm_eval"),
        ),
        (["tracker.kinds=[table]"], "no tracker 'table'"),
        (["schedule.options.a=1"], "schedule.kind=cosine reads none"),
        (["optim.options={a: 1}"], "optim.kind=adamw reads none"),
        (
            ["run.plugins=[halves]", "task.kind=halves", "task.z_loss=1e-4"],
            "task.z_loss=0.0001: task.kind=halves computes its own loss",
        ),
        (["run.plugins=[rows]", "data.kind=multiples"], "data.path=x: data.kind=multiples takes its place"),
        (
            ["run.plugins=[rows]", "data.kind=multiples", "data.path=''", "data.eval_path=y"],
            "data.eval_path=y: data.kind=multiples takes its place",
        ),
    ],
)
def test_what_no_module_registers_is_refused(words: list[str], said: str, tmp_path: Path) -> None:
    files_of_the_documentation(tmp_path)
    assert said in four_parts(
        refused(*words),
        said.partition("=")[0] if said[:4] in ("run.", "data", "task") and "MODULE" not in said else "",
    )


def test_a_registered_optimizer_is_for_our_own_engine_and_not_beside_the_plain_loop(tmp_path: Path) -> None:
    files_of_the_documentation(tmp_path)
    rmsprop = ["run.plugins=[rmsprop,halves]", "optim.kind=rmsprop", "optim.options.momentum=0.9"]
    assert "engine=deepspeed has only AdamW" in four_parts(
        refused(*rmsprop, "engine=deepspeed"), "optim.kind"
    )
    with pytest.raises(ht.UserError, match="the plain loop that bench compares with trains with AdamW"):
        checks.check(compose.compose("bench", ["model=tiny", *rmsprop]))
    checks.check(compose.compose("bench", ["model=tiny", "bench.plain=false", *rmsprop]))
    with pytest.raises(ht.UserError, match="bench times next-token prediction only"):
        checks.check(compose.compose("bench", ["model=tiny", "run.plugins=[halves]", "task.kind=halves"]))


RESULTS = """
import hybridtrain as ht
ht.register("task", "t")(lambda config: object())
ht.register("data", "d")(lambda config: 5)
ht.register("data", "good")(lambda config: [[1, 2, 3]] * 20)
ht.register("data", "long")(lambda config: [[1] * 99] * 20)
ht.register("callback", "c")(lambda config: 5)
ht.register("optimizer", "o")(lambda groups, config: None)
ht.register("schedule", "s")(lambda step, config, total_steps: -1.0)
ht.register("schedule", "n")(lambda step, config, total_steps: None)
"""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["task.kind=t"],
            (
                "task.kind=t: its factory returned object, which has no collate, "
                "counts, loss, loss_of_logits, evaluate, weights"
            ),
        ),
        (["data.kind=d"], "data.kind=d: it has no __len__"),
        (["data.kind=long"], "data.kind=long, row"),
        (["run.callbacks=[c]"], "run.callbacks=[c]: its factory returned int"),
        (["optim.kind=o"], "optim.kind=o: its factory returned NoneType"),
        (["schedule.kind=s"], "schedule.kind=s: it returned -1.0 for step 0 of 2"),
        (["schedule.kind=n"], "schedule.kind=n: it returned None for step 0 of 2"),
        (["train.eval_every=1"], "train.eval_every=1: good holds no held-out row"),
    ],
)
def test_what_a_factory_returns_is_checked(words: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(RESULTS)
    argv = [
        "model=tiny",
        "run.dir=run",
        "run.plugins=[mine]",
        "data.kind=good",
        "data.seq_len=32",
        "train.steps=2",
        *words,
    ]
    [ended] = run_ranks(1, in_folder, tmp_path, "train", argv)
    assert ended.code == 2
    assert said in four_parts(ended.err.split("hybridtrain train: ")[-1], said.partition("=")[0]), ended.err


class Rows(list):  # type: ignore[type-arg]
    """Rows of a class that other processes can import."""


def config_of(run: Path, *words: str) -> schema.Config:
    return ht.compose("model=tiny", "data.seq_len=16", "batch.global_batch_size=4", f"run.dir={run}", *words)


def test_parity_of_a_programs_own_task_and_rows(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = Rows([[(index * n) % 250 for n in range(1, 18)] for index in range(40)])
    found = ht.parity(config_of(run_dir), task=Halves(), data=data, layouts=["dp_shard2-zero3"])
    assert [(row.layout, row.passed) for row in found.rows] == [("dp_shard2-zero3", True)]
    assert (found.passed, found.path) == (True, run_dir / "parity.json")
    assert "from rows of Rows" in capsys.readouterr().out
    importlib.import_module("hybridtrain.parity")
    assert ht.parity is importlib.import_module("hybridtrain.api").parity  # the name stays the function's


def test_parity_refuses_what_its_processes_cannot_import(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Local(ht.CausalLM):
        pass

    main = type("OfProgram", (list,), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "OfProgram", main, raising=False)
    for given, field, said in (
        ({"task": Local()}, "task", "run.plugins=[MODULE] task.kind=NAME"),
        ({"data": [lambda: 1]}, "data", "run.plugins=[MODULE] data.kind=NAME"),
        ({"data": main([[1, 2, 3]])}, "data", "OfProgram is defined in the program itself"),
    ):
        with pytest.raises(ht.UserError) as error:
            ht.parity(config_of(run_dir), layouts=["single"], **given)
        assert said in four_parts(str(error.value), field)
    assert not run_dir.exists()


def test_rows_come_from_one_place(run_dir: Path, tmp_path: Path) -> None:
    files_of_the_documentation(tmp_path)
    config = config_of(run_dir, "run.plugins=[rows]", "data.kind=multiples", "train.steps=1")
    for call in (
        lambda: ht.Trainer(config, data=[[1, 2, 3]]).fit(),
        lambda: ht.parity(config, data=[[1, 2, 3]]),
    ):
        with pytest.raises(ht.UserError, match=r"data\.kind=multiples: rows are given as `data` too"):
            call()
