"""What comes through ${oc.env:...} reaches no file, tracker, log, page or command line; and a run that is
only looked at reads nobody's environment."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hybridtrain.config import compose, schema
from hybridtrain.config.schema import ClusterConfig
from hybridtrain.errors import UserError, refusal
from hybridtrain.submit import create, script
from tests.runs import arguments

SECRET = "s3cr3t-Value-47110815"
# what training opens, or holds against a list: a secret cannot stand there, and the refusal of a
# wrong word is another test
READ = {
    "run.dir",
    "run.resume",
    "run.stop_signal",
    "run.branch_from",
    "data.path",
    "data.eval_path",
    "model.from_pretrained",
    "model.attention",
    "batch.unit",
}


def string_options() -> list[str]:
    """Options of a training whose value is any text: those that keep a word that no list knows."""
    found = []
    for section in dataclasses.fields(schema.Config):
        if not dataclasses.is_dataclass(section.default_factory):
            continue
        for option in dataclasses.fields(section.default_factory):
            key = f"{section.name}.{option.name}"
            if (
                str(option.type) == "str"
                and key not in READ
                and section.name in ("run", "model", "data", "tracker")
                and "kind" not in option.name
            ):
                found.append(key)
    return found


def test_a_training_tells_nobody(data: Path, tmp_path: Path) -> None:
    """Every text option that takes any text holds the secret, one of them through another option; the run is
    resumed with one changed."""
    run, environment = tmp_path / "run", {**os.environ, "A_SECRET": SECRET, "OMP_NUM_THREADS": "1"}
    planted = [key for key in string_options() if _is_free(key, data)]
    assert {"run.name", "model.name", "model.revision", "tracker.project", "data.text_key"} <= set(planted), (
        planted
    )
    words = [f"{key}=${{oc.env:A_SECRET}}" for key in planted if key not in ("tracker.project", "run.name")]
    words += ["run.name='${oc.env:A_SECRET}'", "tracker.project='${run[name]}'"]
    options = {"train__steps": 2, "tracker__kinds": "[wandb,tensorboard]"}
    argv = [text for text in arguments(run, data, **options) if text.partition("=")[0] not in planted]
    seen = [_train([*argv, *words], environment)]
    seen.append(
        _train([*argv, *words, "train.steps=3", "model.name='other-${oc.env:A_SECRET}'"], environment)
    )
    report = [sys.executable, "-m", "hybridtrain.cli", "report", str(run)]
    seen.append(subprocess.run(report, env=environment, capture_output=True, text=True, check=True).stdout)
    assert "changed   model.name: ${oc.env:A_SECRET} -> other-${oc.env:A_SECRET}" in seen[1]
    for text in seen:
        assert SECRET not in text
    files = [path for path in tmp_path.rglob("*") if path.is_file() or SECRET in path.name]
    assert len(files) > 20
    assert any("wandb" in path.name for path in files)
    for path in files:
        assert SECRET not in str(path)
        assert SECRET.encode() not in path.read_bytes(), path
    page = (run / "report/index.html").read_text()
    assert "<h1>${oc.env:A_SECRET}</h1>" in page


def _is_free(key: str, data: Path) -> bool:
    """Whether a training accepts any text there."""
    from hybridtrain.config import checks

    try:
        config = compose.compose("train", [*arguments(Path("run"), data), f"{key}=any-text"])
        checks.check(config)
    except UserError:
        return False
    return True


def _train(argv: list[str], environment: dict[str, str]) -> str:
    """What it prints; while it runs, no command line below this process may have the secret."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hybridtrain.train", *argv],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines: set[str] = set()
    while process.poll() is None:
        for child in psutil.Process().children(recursive=True):
            try:
                lines.add(" ".join(child.cmdline()))
            except psutil.Error:
                continue
        time.sleep(0.1)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert lines
    assert not [line for line in lines if SECRET in line]
    return said


def test_the_run_of_somebody_else_reads_no_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hybridtrain.cli.main import main
    from tests.report.folders import row, write

    monkeypatch.setenv("READERS_KEY", SECRET)
    config = schema.Config()
    runs = [
        write(tmp_path / "runs" / name, [row(1), row(2)], summary={"status": "finished"}, config=config)
        for name in ("a", "b")
    ]
    for run in runs:
        text = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(
            text.replace("name: ''", "name: ${oc.env:READERS_KEY}", 1).replace(
                "project: hybridtrain", "project: '${run[name]}'"
            )
        )
        (run / "logs").mkdir()
        (run / "logs/rank-0.log").write_text("line\n")
    assert main(["report", str(runs[0])]) == 0
    assert main(["report", "--compare", *map(str, runs), f"report.out={tmp_path / 'out'}"]) == 0
    assert main(["runs", f"runs.folder={tmp_path / 'runs'}"]) == 0
    assert main(["logs", str(runs[0])]) == 0
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err
    for path in tmp_path.rglob("*"):
        assert SECRET not in path.name
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    monkeypatch.delenv("READERS_KEY")
    assert main(["report", str(runs[0])]) == 0
    assert "<h1>${oc.env:READERS_KEY}</h1>" in (runs[0] / "report/index.html").read_text(), (
        "it is read where the variable is not set"
    )


def test_a_frozen_run_and_its_script_hold_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", SECRET)
    config = compose.compose(
        "submit",
        ["run.name='${oc.env:A_SECRET}'", "cluster.environment={WANDB_API_KEY: '${oc.env:A_SECRET}'}"],
    )
    create.write_config(schema.Config(run=config.run), tmp_path / "run")
    assert SECRET not in (tmp_path / "run/submit/conf/experiment/submitted.yaml").read_text()
    said = {
        "name": "x",
        "folder": tmp_path,
        "work_dir": tmp_path,
        "python": "python",
        "stop_signal": "USR1",
        "plugins": [],
        "runs": [tmp_path / "run"],
    }
    text = script.render(config.cluster, **said)
    assert SECRET not in text
    head = text.partition("# --- job ---")[0] + 'printf %s "$WANDB_API_KEY"'
    assert (
        subprocess.run(
            ["bash"], input=head, env={"A_SECRET": SECRET}, capture_output=True, text=True, check=True
        ).stdout
        == SECRET
    )
    mixed = compose.Interpolated(f"x-{SECRET}", "x-${oc.env:A_SECRET}")
    with pytest.raises(UserError, match=r"would be written into the job script") as refused:
        script.render(ClusterConfig(environment={"KEY": mixed}), **said)
    assert SECRET not in str(refused.value)


def test_a_refusal_shows_the_reference() -> None:
    text = str(
        refusal(
            "model.revision",
            compose.Interpolated(SECRET, "${oc.env:A_SECRET}"),
            "no",
            allowed="x",
            instead="y",
        )
    )
    assert text.startswith("model.revision=${oc.env:A_SECRET}: no")
