"""Every command of the README runs, pasted as it stands, with its work shortened where it is long."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hybridtrain.cli.commands import run_command
from hybridtrain.config import schema

ROOT = Path(__file__).resolve().parent.parent
SHORTER = {
    "experiment=smoke schedule=constant parallel=tp2": ["train.steps=4", "train.eval_every=2", "checkpoint.every=2"],
    "experiment=smoke schedule=constant parallel=zero1_pp2": ["train.steps=6", "train.eval_every=3", "checkpoint.every=2"],
    "engine=deepspeed": ["train.steps=3", "train.eval_every=3"],
    "hybridtrain parity": ["parity.steps=1"],
    "hybridtrain bench": ["bench.rounds=1", "bench.steps=1", "bench.warmup=1"],
    "hybridtrain generate": ["generate.max_new_tokens=8"],
    "model.from_pretrained=runs/smoke/export": ["train.steps=3"],
    "hybridtrain train --nproc 2 model=tiny": ["train.steps=2"],
}


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_what_the_readme_starts_with_is_there() -> None:
    scripts = [line.split()[1] for line in commands() if line.startswith("bash ")]
    assert scripts == ["launch/quickstart.sh", "launch/test.sh"]
    for script in scripts:
        subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


def makes_files(line: str) -> bool:
    """Whether a line makes the files that others read, with what every shell and Python has."""
    return line.startswith(("mkdir ", "python -c "))


def as_composed(line: str) -> tuple[str, list[str]]:
    """The command and its arguments."""
    words = shlex.split(line)
    assert words[0] == "hybridtrain"
    return words[1], words[2:]


@pytest.mark.parametrize("line", [line for line in commands() if not line.startswith("bash ") and not makes_files(line)])
def test_each_command_composes(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, argv = as_composed(line)
    assert run_command(name, [*argv, "--cfg", "job"]) == 0
    composed = yaml.safe_load(capsys.readouterr().out)
    assert composed.keys() == {section.name for section in dataclasses.fields(schema.ROOTS[name])}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_five_things_to_try(tmp_path: Path) -> None:
    """In order, in one folder: a later command uses what an earlier one wrote."""
    for name in ("README.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, tmp_path)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    run = [line for line in commands() if not line.startswith("bash ")]
    assert len(run) >= 8
    used = set()
    for line in run:
        extra = next((SHORTER[key] for key in SHORTER if key in line), [])
        used |= {key for key in SHORTER if key in line}
        command = ["bash", "-c", line] if makes_files(line) else [*shlex.split(line), *extra]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert used == set(SHORTER), "a shortening that no command uses"
    assert (tmp_path / "runs/smoke/parity.json").is_file()
    assert (tmp_path / "runs/mine/summary.json").is_file()
    documents = {name: json.loads((tmp_path / f"data/{name}/corpus.json").read_text())["splits"] for name in ("jsonl", "parquet", "datasets", "chat")}
    assert {name: sum(split["documents"] for split in splits.values()) for name, splits in documents.items()} == {
        "jsonl": 220,
        "parquet": 200,
        "datasets": 200,
        "chat": 200,
    }


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_quickstart(tmp_path: Path) -> None:
    """As a user would: the whole script; the loss falls well below its start, and the export's perplexity is our own evaluation's."""
    done = subprocess.run(["bash", "launch/quickstart.sh", f"run.dir={tmp_path / 'run'}"], cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["eval_loss"] < 0.7 * rows[0]["loss"]  # of 64 rows; the last step's own 8 rows may be hard ones
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    evaluated = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert evaluated["loss"] == pytest.approx(rows[-1]["eval_loss"], rel=1e-4)
    for said in ("run directory", "loss curve", "sample of the exported model"):
        assert said in done.stdout
    assert (tmp_path / "run/report/loss.png").stat().st_size > 10_000
