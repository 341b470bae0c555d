"""Who imports a user's own modules: training, on every rank; nobody who reads or submits a run directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import hybridtrain as ht
from hybridtrain.config import checks, compose, schema
from hybridtrain.submit import create, job, script
from tests.plugins import PLANTED, fresh, in_folder  # noqa: F401 - a fixture
from tests.ranks import run_ranks
from tests.runs import Ended, arguments, finished
from tests.submit.test_damaged import in_a_job


def planted_in(run: Path) -> None:
    """The run says that it was trained with a module, which leaves a file where it is imported."""
    (Path.cwd() / "planted.py").write_text(PLANTED)
    text = (run / "config.yaml").read_text()
    assert ("  plugins: []\n" in text) != ("  - planted\n" in text)
    (run / "config.yaml").write_text(text.replace("  plugins: []\n", "  plugins:\n  - planted\n"))
    assert yaml.safe_load((run / "config.yaml").read_text())["run"]["plugins"] == ["planted"]
    assert compose.read_run(run / "config.yaml").run.plugins == []


def test_a_run_directory_that_is_read_imports_nothing(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    argv = arguments(run, data, train__steps=2)
    finished(1, argv)
    planted_in(run)
    looked = [
        ("export", [str(run)]),
        ("evaluate", [str(run)]),
        ("generate", [str(run), "generate.max_new_tokens=2"]),
        ("report", [str(run)]),
    ]
    looked += [
        ("verify", [str(run)]),
        ("runs", []),
        ("logs", [str(run), "logs.follow=false"]),
        ("train", [*argv, "train.steps=3"]),
    ]
    looked += [
        ("train", [*argv, f"run.dir={tmp_path / 'branch'}", f"run.branch_from={run}", "train.steps=4"])
    ]
    for command, words in looked:
        if command == "train":
            planted_in(run)
        [ended] = run_ranks(1, in_folder, tmp_path, command, words)
        assert ended.code == 0, (command, ended.err)
        assert not (tmp_path / "imported").exists(), command
    [ended] = run_ranks(1, in_folder, tmp_path, "train", [*argv, "train.steps=4", "run.plugins=[planted]"])
    assert ended.code == 0, ended.err
    assert (tmp_path / "imported").exists()


def test_what_submit_leaves_in_a_run_permits_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The modules stand on the command line of the job, not in the run's frozen configuration; a file there
    that names some is not heard."""
    (tmp_path / "planted.py").write_text(PLANTED)
    run = tmp_path / "run"
    argv = [*arguments(run, data), "run.plugins=[planted]", "schedule.kind=planted"]
    config = compose.train_config(argv)
    create.write_config(config, run)
    frozen = run / "submit/conf/experiment/submitted.yaml"
    words = ["--config-dir", str(run / "submit/conf"), "experiment=submitted"]
    assert "plugins: []" in frozen.read_text()
    frozen.write_text(frozen.read_text().replace("plugins: []", "plugins: [planted]"))
    assert compose.train_config(words).run.plugins == []
    with pytest.raises(ht.UserError, match="not one of the kinds"):
        checks.check(compose.train_config(words))
    assert not (tmp_path / "imported").exists()
    checks.check(compose.train_config([*words, script.plugins_word(config.run.plugins)]))
    assert (tmp_path / "imported").exists()

    told = {
        "name": "x",
        "folder": run / "submit",
        "work_dir": tmp_path,
        "python": "python",
        "stop_signal": "USR1",
        "runs": [run],
    }
    text = script.render(schema.ClusterConfig(), **told, plugins=config.run.plugins)
    assert "export HYBRIDTRAIN_PLUGINS='run.plugins=[planted]'" in text
    in_a_job(monkeypatch, run, restarts=0)
    for plugins, printed in (
        ("run.plugins=[planted]", f"{run}\nrun.plugins=[planted]\n"),
        ("", f"{run}\n\n"),
    ):
        monkeypatch.setenv("HYBRIDTRAIN_PLUGINS", plugins)
        assert job.open_job([]) == 0
        assert capsys.readouterr().out == printed
    monkeypatch.delenv("HYBRIDTRAIN_RUN")
    monkeypatch.setenv("HYBRIDTRAIN_WORLD", "1")
    assert job.open_job([*argv, f"run.dir={tmp_path / 'other'}"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'other'}\nrun.plugins=[planted]\n"
    assert "plugins: []" in (tmp_path / "other/submit/conf/experiment/submitted.yaml").read_text()


def on_rank_1(folder: Path, argv: list[str]) -> Ended:
    os.environ.update(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    return in_folder(folder, "train", argv)


def test_a_module_that_rank_0_has_and_another_lacks_is_said_by_the_other(tmp_path: Path) -> None:
    """What all ranks would refuse alike is said by rank 0 alone; an import may fail on one host only."""
    for words, said in (
        (["run.plugins=[absent]"], "[rank 1] hybridtrain train: run.plugins=absent: it cannot be imported"),
        (["optim.lr=-1"], ""),
    ):
        [ended] = run_ranks(1, on_rank_1, tmp_path, ["model=tiny", "data.path=x", "train.steps=1", *words])
        assert (ended.code, ended.err[: len(said) or None]) == (2, said), ended.err


def test_showing_a_configuration_imports_neither_torch_nor_a_module(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(PLANTED)
    code = (
        "import sys; from hybridtrain.cli.main import main; "
        "code = main(sys.argv[1:]); print('torch' in sys.modules, code)"
    )
    argv = ["train", "model=tiny", "run.plugins=[planted]", "schedule.kind=planted", "--cfg", "job"]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False 0"
    assert not (tmp_path / "imported").exists()
