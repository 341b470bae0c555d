"""The command line as a user meets it: help, composed config, sweeps, rank 0 alone speaking."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from hybridtrain import __version__
from hybridtrain.cli import commands
from hybridtrain.cli.main import main
from hybridtrain.config import compose, keys, schema
from hybridtrain.config.sweep import sweep
from hybridtrain.run import start
from hybridtrain.runtime import launch
from hybridtrain.training import trainer
from tests.cli.lines import TRAIN, python, refused
from tests.runs import arguments


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name}" in text for name in commands.COMMANDS)
    assert set(commands.COMMANDS) == set(schema.ROOTS)
    assert main([]) == 2
    capsys.readouterr()
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hybridtrain {__version__}\n"


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_help_of_a_command_explains_its_own_options_and_groups_alone(capsys, name):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    words = " ".join(text.split())
    options = [field for fields in keys.sections(name).values() for field in fields]
    assert all(f"  {field.key}" in text and field.doc in words for field in options)
    groups = {
        group: files
        for group, files in keys.groups([keys.conf_folder()]).items()
        if group in ("experiment", *keys.sections(name))
    }
    assert all(f"{group} {', '.join(files)}" in words for group, files in groups.items())
    entries = [
        line.split()[0] for line in text.partition("\ngroups ")[2].splitlines()[1:] if re.match(r"  \S", line)
    ]
    assert entries == [*groups, *(field.key for field in options)]


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_has_its_function(name):
    module, function, _ = commands.COMMANDS[name]
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"{module} is not there"
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text())
    [found] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    assert len(found.args.args) == 1


def test_cfg_job_prints_what_composes(capsys):
    assert main(["train", "experiment=smoke", "train.steps=3", "--cfg", "job"]) == 0
    text = capsys.readouterr().out
    assert "  steps: 3\n" in text
    assert "  dir: runs/smoke\n" in text
    assert main(["export", "runs/mine run", "--cfg=job"]) == 0
    assert "  dir: runs/mine run\n" in capsys.readouterr().out


def test_multirun_is_refused_under_torchrun(capsys, monkeypatch):
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert "outside torchrun" in refused(capsys, ["train", "-m", "optim.lr=1,2"])


@pytest.mark.parametrize("name", ["train", "submit"])
def test_runs_of_a_sweep_do_not_share_a_folder(capsys, name):
    line = [name, "-m", "experiment=smoke", "optim.lr=1e-3,3e-4"]
    assert "run.dir=runs/all: one folder for several of 2 runs" in refused(
        capsys, [*line, "run.dir=runs/all"]
    )
    assert [
        compose.compose(name, job).run.dir for job in sweep(name, [*line[2:], "run.dir='all/${run.name}'"])
    ] == ["all/smoke-0", "all/smoke-1"]


@pytest.mark.slow
def test_a_sweep_ends_with_a_table(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [text for text in arguments(tmp_path, data, train__steps=2) if not text.startswith("run.dir=")]
    for rates, runs in (
        ("1e-3,3e-4", ("sweep-0", "sweep-1")),
        ("2e-3,5e-4", ("sweep-0-2", "sweep-1-2")),
        ("2e-3,5e-4", ("sweep-0-2", "sweep-1-2")),
    ):
        done = python(
            "-m",
            "hybridtrain.cli",
            "train",
            "--multirun",
            *given,
            "run.name=sweep",
            f"optim.lr={rates}",
            PYTHONPATH=str(Path(__file__).parents[2]),
        )
        assert done.returncode == 0, done.stderr
        assert all((tmp_path / "runs" / run / "config.yaml").is_file() for run in runs)
        table = (
            done.stdout[done.stdout.rindex("[2/2] hybridtrain train") :]
            .partition("\noptim.lr ")[2]
            .partition("\n")[0]
        )
        assert table.split() == [f"{float(rate):g}" for rate in rates.split(",")], (
            "of these runs, not of those of before"
        )


def test_a_run_of_a_sweep_tells_its_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(launch.RUN_DIR_FILE, str(tmp_path / "told"))
    for rate, folder in (("1e-3", "runs/x"), ("2e-3", "runs/x-2"), ("2e-3", "runs/x-2")):
        config = compose.compose("train", [*TRAIN[1:], "run.name=x", f"optim.lr={rate}"])
        entry = start.lock_run(config)
        assert (tmp_path / "told").read_text() == folder
        (entry.path / "config.yaml").write_text(compose.to_yaml(config))
        (entry.path / "summary.json").write_text('{"steps": 100}')
        entry.lock.release()
    assert trainer._finished_result(config) == trainer.Result(Path("runs/x-2"), "finished", 100, 0), (
        "what a run that was at its end gives back"
    )


def test_multirun_runs_every_combination():
    done = python("-m", "hybridtrain.cli", "report", "-m", "run.dir=no-such-a,no-such-b")
    assert done.returncode != 0
    assert "[1/2] hybridtrain report run.dir=no-such-a" in done.stdout
    assert "[2/2] hybridtrain report run.dir=no-such-b" in done.stdout


LOGGING = """
import logging, warnings
from pathlib import Path
from hybridtrain.runtime import log
log.setup(None)
log.setup(Path("logs"))
log.get("loop").info("step 1")
log.get("hybridtrain.training.loop").error("it broke")
logging.getLogger("transformers.models").warning("chatter")
warnings.warn("old habits")
"""


def test_rank_0_speaks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = python("-c", LOGGING, RANK="0", PYTHONPATH=str(Path(__file__).parents[2]))
    assert done.stdout == "step 1\nerror: it broke\n"
    assert "old habits" in done.stderr
    lines = (tmp_path / "logs" / "rank-0.log").read_text()
    assert lines.count("step 1") == 1
    assert "hybridtrain.training.loop: it broke" in lines


def test_other_ranks_only_say_errors_and_who_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = python("-c", LOGGING, RANK="3", PYTHONPATH=str(Path(__file__).parents[2]))
    assert done.stdout == ""
    assert done.stderr == "[rank 3] ERROR hybridtrain.training.loop: it broke\n"
    lines = (tmp_path / "logs" / "rank-3.log").read_text()
    assert all(words in lines for words in ("step 1", "it broke", "chatter", "old habits"))


def test_a_process_leaves_with_its_output_and_exit_functions_but_is_not_taken_apart():
    """A gloo thread that lets go of a tensor while the interpreter is being taken apart
    aborts the process."""
    script = """
import atexit, os
from hybridtrain.cli import main
from hybridtrain.run import start
from hybridtrain.runtime import launch
from hybridtrain.training import trainer
class Apart:
    def __del__(self):
        os.write(1, b"taken apart")
kept = Apart()
atexit.register(print, "exit function")
main.main = lambda: 3
main.program()
"""
    done = python("-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (3, "exit function\n", "")
