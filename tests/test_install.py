"""The installed package: the wheel with what it requires and nothing else, the optional parts,
and launch/setup.sh."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from hybridtrain import __version__
from hybridtrain.config import keys
from hybridtrain.config.checks import TRACKERS_OF_EXTRAS

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def required(names: list[str]) -> set[str]:
    """The distributions that these requirements come to, with all that those require."""
    found: set[str] = set()
    waiting = [Requirement(text) for text in names]
    while waiting:
        one = waiting.pop()
        if one.name.lower() in found or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        found.add(one.name.lower())
        waiting += [Requirement(text) for text in importlib.metadata.requires(one.name) or []]
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    words = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT]
    built = subprocess.run(words, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    [file] = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of an environment with the wheel and the packages that it requires, of this
    environment, and no others."""
    venv = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        venv / "bin" / "python",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*pip, wheel], check=True)
    [site] = venv.glob("lib/python*/site-packages")
    for name in required(PROJECT["dependencies"]):
        files = importlib.metadata.distribution(name).files or []
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(importlib.metadata.distribution(name).locate_file(top))
    return venv / "bin" / "hybridtrain"


def run(program: Path, *words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [program, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_the_wheel_holds_its_licence_and_all_of_conf(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    [licence] = [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]
    assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    metadata = archive.read(licence.replace("licenses/LICENSE", "METADATA")).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert {line.split()[1] for line in metadata.splitlines() if line.startswith("Provides-Extra:")} == set(
        PROJECT["optional-dependencies"]
    )
    assert {"hybridtrain/report/page.css", "hybridtrain/report/page.js"} <= set(names)
    carried = {
        name.removeprefix("hybridtrain/conf/") for name in names if name.startswith("hybridtrain/conf/")
    }
    assert carried == {
        str(path.relative_to(keys.conf_folder())) for path in keys.conf_folder().rglob("*.yaml")
    }


def test_the_wheel_composes_outside_the_checkout(program: Path, tmp_path: Path) -> None:
    assert run(program, "--version", folder=tmp_path).stdout == f"hybridtrain {__version__}\n"
    shown = run(program, "train", "--cfg", "job", "experiment=smoke", folder=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "dir: runs/smoke" in shown.stdout


TRAIN = ("train", "model=tiny", "data.path=x", "train.steps=3")
MISSING = {
    "data": ("prepare", "data.source=[rows.parquet]", "data.path=x"),
    "deepspeed": (*TRAIN, "engine=deepspeed"),
    "quantize": ("quantize", "one"),
    "report": ("report", "--compare", "one", "two"),
    "torchao": ("quantize", "one", "quantize.scheme=fp8_e5m2"),
    "trackers": (*TRAIN, "tracker=tensorboard"),
    "wandb": (*TRAIN, "tracker=wandb"),
}


@pytest.mark.parametrize("extra", MISSING)
def test_a_missing_package_is_refused_with_the_extra_that_has_it(
    program: Path, tmp_path: Path, extra: str
) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("{}")
    refused = run(program, *MISSING[extra], folder=tmp_path)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert f'pip install "hybridtrain[{extra}]"' in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_command_that_a_refusal_names_asks_for_the_missing_packages_alone(
    program: Path, tmp_path: Path
) -> None:
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        program.with_name("python"),
        "install",
        "--no-index",
        "hybridtrain[report]",
    ]
    asked = subprocess.run(pip, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "No matching distribution found for matplotlib" in asked.stderr


ALONE = {"torchao"}  # transformers imports it, wherever it is installed, whenever it loads a model


def test_every_extra_is_a_part_of_all_and_has_a_command_that_names_it() -> None:
    extras = PROJECT["optional-dependencies"]
    assert set(extras) == {"all", "test", *MISSING}
    parts = Requirement(extras["all"][0]).extras
    assert {text for part in parts for text in extras[part]} >= {
        text for part in MISSING.keys() - ALONE for text in extras[part]
    }
    assert set(TRACKERS_OF_EXTRAS.values()) <= set(MISSING)
    assert [
        extra
        for extra in extras
        if extra != "test" and f"`{extra}`" not in (ROOT / "docs" / "support.md").read_text()
    ] == []


@pytest.mark.slow
def test_the_wheel_trains_outside_the_checkout_with_what_it_requires_alone(
    program: Path, tmp_path: Path
) -> None:
    words = (
        "model=tiny",
        "model.config.vocab_size=300",
        "data.seq_len=32",
        "data.path=data",
        "parallel=zero1_pp2",
        "schedule=constant",
        "train.steps=3",
    )
    (tmp_path / "text").mkdir()
    for number in range(12):
        (tmp_path / "text" / f"{number}.txt").write_text(
            " ".join(f"{number * n} follows {n * n},\n" for n in range(300))
        )
    prepared = run(
        program,
        "prepare",
        "data.source=[text]",
        "data.path=data",
        "data.vocab_size=300",
        "data.eval_fraction=0.09",
        folder=tmp_path,
    )
    assert prepared.returncode == 0, prepared.stdout + prepared.stderr
    ended = run(program, "train", "--nproc", "2", *words, "run.dir=runs/smoke", folder=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    summary = json.loads((tmp_path / "runs" / "smoke" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 3)
    assert run(program, "export", "runs/smoke", folder=tmp_path).returncode == 0
    assert (
        run(
            program,
            "generate",
            "runs/smoke",
            "generate.prompt=1",
            "generate.max_new_tokens=4",
            folder=tmp_path,
        ).returncode
        == 0
    )
    sweep = run(
        program,
        "train",
        "--multirun",
        *words,
        "parallel=single",
        "train.steps=1",
        "optim.lr=1e-3,3e-4",
        folder=tmp_path,
    )
    assert sweep.returncode == 0, sweep.stdout + sweep.stderr
    assert (
        'the runs are not compared: matplotlib is not installed; pip install "hybridtrain[report]"'
        in sweep.stdout
    )


def test_setup_installs_what_is_asked_for_once(tmp_path: Path) -> None:
    """launch/setup.sh in a folder whose Python notes what it is asked to install."""
    for name in ("pyproject.toml", "constraints.txt", "launch/setup.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\n')
    python.chmod(0o755)

    def installed(*words: str) -> list[str]:
        """The parts that a call of the script installs."""
        (tmp_path / "asked").write_text("")
        subprocess.run(["bash", tmp_path / "launch" / "setup.sh", *words], check=True, capture_output=True)
        return [
            line.split()[-1] for line in (tmp_path / "asked").read_text().splitlines() if "--editable" in line
        ]

    assert installed() == [".[data,report,trackers]"]
    assert installed() == []
    assert installed("all") == [".[all]"]
    assert installed("all") == installed() == []
    assert installed("test") == [".[all,test]"]
    assert installed("test") == installed("all") == installed() == []
    (tmp_path / "pyproject.toml").write_text("changed")
    assert installed() == [".[data,report,trackers]"]
    refused = subprocess.run(
        ["bash", tmp_path / "launch" / "setup.sh", "everything"], capture_output=True, text=True, check=False
    )
    assert (refused.returncode, "allowed: nothing, all, test" in refused.stderr) == (2, True)
