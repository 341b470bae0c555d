"""The commands and programs of the README and the documents run, pasted as they stand, with their work
shortened where it is long."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT, RUN_IN_ORDER, blocks, commands, read

SHORTER = {
    "experiment=smoke schedule=constant parallel=tp2": [
        "train.steps=4",
        "train.eval_every=2",
        "checkpoint.every=2",
    ],
    "experiment=smoke schedule=constant parallel=zero1_pp2": [
        "train.steps=6",
        "train.eval_every=3",
        "checkpoint.every=2",
    ],
    "engine=deepspeed": ["train.steps=3", "train.eval_every=3"],
    "hybridtrain parity": ["parity.steps=1"],
    "hybridtrain bench": ["bench.rounds=1", "bench.steps=1", "bench.warmup=1"],
    "hybridtrain generate": ["generate.max_new_tokens=8"],
    "model.from_pretrained=runs/smoke/export": ["train.steps=3"],
    "hybridtrain train --nproc 2 model=tiny": ["train.steps=2"],
}


def pieces(name: str) -> list[tuple[str, str]]:
    """(language, text) of a document: each line of bash, each program of Python, in order."""
    found = []
    for language, block in re.findall(
        r"^```(bash|python)\n(.*?)^```", read(name), flags=re.DOTALL | re.MULTILINE
    ):
        found += (
            [(language, block)]
            if language == "python"
            else [(language, line) for line in block.splitlines() if shlex.split(line, comments=True)]
        )
    return found


def test_what_the_readme_starts_with_is_there() -> None:
    scripts = [
        line.split()[1]
        for block in blocks("README.md", "bash")
        for line in block.splitlines()
        if line.startswith("bash ")
    ]
    assert scripts == ["launch/quickstart.sh"]
    assert "`bash launch/test.sh`" in read("README.md")
    for script in (*scripts, "launch/test.sh"):
        subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_documents_in_order(tmp_path: Path) -> None:
    """In one folder: a later command uses what an earlier one wrote."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": path,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    used, output = set(), {}
    for name in RUN_IN_ORDER:
        for language, text in pieces(name):
            if text.startswith("bash launch/"):
                continue
            keys = {key for key in SHORTER if key in text}
            used |= keys
            line = text if language == "bash" else f"python -c {shlex.quote(text)}"
            line = " ".join([line.partition(" #")[0], *SHORTER[keys.pop()]]) if keys else line
            done = subprocess.run(
                ["bash", "-c", line],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            assert done.returncode == 0, f"{name}: {line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
            output[text] = done.stdout
    assert used == set(SHORTER), "a shortening that no command uses"
    picture = [sys.executable, ROOT / "launch" / "layouts.py", "layouts.png", "train.steps=2"]
    subprocess.run(
        picture, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    assert (tmp_path / "layouts.png").stat().st_size > 10_000
    assert (tmp_path / "runs/mine/summary.json").is_file()
    assert (tmp_path / "runs/python/export/model.safetensors").is_file()
    [parity] = [
        text
        for line, text in output.items()
        if line.startswith("hybridtrain parity experiment=smoke parity.layouts")
    ]
    assert_is_printed(parity)
    documents = {
        name: json.loads((tmp_path / f"data/{name}/corpus.json").read_text())["splits"]
        for name in ("jsonl", "parquet", "datasets", "chat")
    }
    assert {
        name: sum(split["documents"] for split in splits.values()) for name, splits in documents.items()
    } == {
        "jsonl": 220,
        "parquet": 200,
        "datasets": 200,
        "chat": 200,
    }


def assert_is_printed(parity: str) -> None:
    """What the READMEs show is what parity prints: columns, layouts, processes, verdicts.

    The figures are those of a run of three steps.
    """
    for name in ("README.md", "README.zh.md"):
        [shown] = blocks(name, "console")
        command, *lines = shown.splitlines()
        assert command.removeprefix("$ ") in commands("README.md")
        printed = parity.splitlines()
        assert lines[0] in printed
        ends = {tuple(line.split()[:2] + line.split()[-1:]) for line in printed if line.endswith("pass")}
        assert {
            tuple(line.split()[:2] + line.split()[-1:]) for line in lines if line.endswith("pass")
        } <= ends
        assert lines[-1] in printed


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_command_for_two_machines(data: Path, tmp_path: Path) -> None:
    """docs/cluster.md: both started on this one, smaller; they meet at the port, and train one run."""
    [line] = [line for line in commands("docs/cluster.md") if line.startswith("torchrun --nnodes 2 ")]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    here = {
        "8": "2",
        "node1:29400": f"localhost:{port}",
        "model=llama3_1_8b": "model=tiny",
        "train.steps=1000": "train.steps=3",
    }
    here |= {
        "data.path=/shared/data/books": f"data.path={data}",
        "run.dir=/shared/runs/books": f"run.dir={tmp_path / 'run'}",
    }
    words = shlex.split(line)
    assert here.keys() <= set(words)
    words = [sys.executable, "-m", "torch.distributed.run", *(here.get(word, word) for word in words[1:])]
    smaller = ["model.config.vocab_size=300", "data.seq_len=32", "schedule=constant"]
    both = [
        subprocess.Popen([*words, *smaller], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
        for _ in range(2)
    ]
    assert [one.wait(timeout=240) for one in both] == [0, 0]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["layout"]) == ("finished", 3, "dp_shard2-tp2-zero3")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_quickstart(tmp_path: Path) -> None:
    """As a user would: the whole script; the loss falls well below its start, and the export's perplexity is
    our own evaluation's."""
    done = subprocess.run(
        ["bash", "launch/quickstart.sh", f"run.dir={tmp_path / 'run'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    # of 64 rows; the last step's own 8 rows may be hard ones
    assert rows[-1]["eval_loss"] < 0.7 * rows[0]["loss"]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    evaluated = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert evaluated["loss"] == pytest.approx(rows[-1]["eval_loss"], rel=1e-4)
    for said in ("run directory", "loss curve", "sample of the exported model"):
        assert said in done.stdout
    assert (tmp_path / "run/report/loss.png").stat().st_size > 10_000
