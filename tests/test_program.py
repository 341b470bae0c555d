"""A whole program outside the checkout: its own rows, loss, callback and optimizer, under every kind of
layout, killed and resumed, and proven."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import assert_equal_state, rows, summary

OWN = '''
import torch
import hybridtrain as ht
from hybridtrain.types import IGNORE_INDEX

class Rows:
    """Rows that count on in strides."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return self.rows

    def row(self, index):
        return [(index + n * (1 + index % 7)) % 250 for n in range(33)]

class Weighted(ht.CausalLM):
    """Even tokens count in full, odd ones by a half."""

    weights = {"even": 1.0, "odd": 0.5}

    def labels(self, batch):
        odd = batch.labels_BT % 2 == 1
        even_BT = batch.labels_BT.masked_fill(odd, IGNORE_INDEX)
        return {"even": even_BT, "odd": batch.labels_BT.masked_fill(~odd, IGNORE_INDEX)}

    def counts(self, batch):
        return {name: (labels != IGNORE_INDEX).sum() for name, labels in self.labels(batch).items()}

    def loss(self, hidden_BTD, batch, head):
        labels = self.labels(batch)
        return {name: self.cross_entropy(hidden_BTD, labels[name], head, name=name) for name in labels}

    def loss_of_logits(self, logits_BTV, batch):
        labels = self.labels(batch)
        return {name: self.cross_entropy_of_logits(logits_BTV, labels[name]) for name in labels}

    def evaluate(self, sums):
        means = {name: sums.values[name] / sums.counts[name] for name in self.weights}
        return {"eval_loss": means["even"] + 0.5 * means["odd"], "eval_odd": means["odd"]}

@ht.register("optimizer", "nadam")
def nadam(groups, config):
    return torch.optim.NAdam(groups, lr=config.lr, decoupled_weight_decay=True)
'''
PROGRAM = '''
import os, signal, sys
import hybridtrain as ht
import own

class Watch(ht.Callback):
    """Stops a run that has learnt enough; kills this rank after the step that KILL_AT names."""

    def on_evaluate(self, run, metrics):
        if metrics["eval_loss"] < 8.3:
            run.stop("good enough")

    def on_every_step(self, run, info):
        if f"{info.step} {os.environ.get('RANK', '0')}" == os.environ.get("KILL_AT"):
            os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    config = ht.compose(
        "model=tiny", "data.seq_len=32", "batch.global_batch_size=8", "batch.micro_batch_size=1",
        "train.steps=40", "train.log_every=1", "train.eval_every=4", "schedule=constant", "optim.lr=0.004",
        "run.plugins=[own]", "optim.kind=nadam", "checkpoint.every=3", "run.dir=run", *sys.argv[1:]
    )
    data = {"data": own.Rows(200), "eval_data": own.Rows(9)}
    result = ht.Trainer(config, task=own.Weighted(), callbacks=[Watch()], **data).fit()
    sys.stdout.write(f"{result.status} {result.step}\\n")
'''
PROOF = """
import hybridtrain as ht
import own

if __name__ == "__main__":
    config = ht.compose(
        "model=tiny", "data.seq_len=32", "batch.global_batch_size=8", "optim.lr=0.004",
        "run.plugins=[own]", "optim.kind=nadam"
    )
    layouts = ["tp2-pp2", "dp_shard2-zero3"]
    found = ht.parity(config, task=own.Weighted(), data=own.Rows(200), layouts=layouts, steps=2)
    print("proven", found.passed)
"""


def run_program(folder: Path, *words: str, processes: int, kill: str) -> subprocess.CompletedProcess[str]:
    """`python mine.py WORD ...`, or under torchrun. `kill`: "STEP RANK" that kills itself, or empty."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "KILL_AT": kill}
    launcher = (
        []
        if processes == 1
        else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    )
    return subprocess.run(
        [sys.executable, *launcher, "mine.py", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program's folder, after a run in one process."""
    folder = tmp_path_factory.mktemp("program")
    for name, text in (("own.py", OWN), ("mine.py", PROGRAM), ("prove.py", PROOF)):
        (folder / name).write_text(text)
    done = run_program(folder, processes=1, kill="")
    assert done.returncode == 0, done.stderr
    assert summary(folder / "run")["exit_reason"] == "good enough"
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "processes"), [("tp2_pp2", 4), ("zero3", 2)])
def test_killed_and_given_again_it_ends_as_the_run_that_was_not(
    alone: Path, layout: str, processes: int
) -> None:
    whole, broken = f"whole-{layout}", f"broken-{layout}"
    done = run_program(alone, f"parallel={layout}", f"run.dir={whole}", processes=processes, kill="")
    assert done.returncode == 0, done.stderr
    for here, there in zip(rows(alone / whole), rows(alone / "run"), strict=True):
        for key in ("loss", "train_even", "train_odd"):
            assert here[key] == pytest.approx(there[key], rel=1e-5)
    killed = run_program(
        alone, f"parallel={layout}", f"run.dir={broken}", processes=processes, kill=f"5 {processes - 1}"
    )
    assert killed.returncode != 0
    assert 3 <= rows(alone / broken)[-1]["step"] <= 6
    again = run_program(alone, f"parallel={layout}", f"run.dir={broken}", processes=processes, kill="")
    assert again.returncode == 0, again.stderr
    assert [ended.stdout.splitlines().count("finished 17") for ended in (done, again)] == [
        processes,
        processes,
    ]
    for key in ("loss", "grad_norm", "train_even", "train_odd"):
        assert [line[key] for line in rows(alone / broken)] == [line[key] for line in rows(alone / whole)]
    last = sorted(path.name for path in (alone / whole / "checkpoints").iterdir())[-1]
    assert_equal_state(alone / broken / "checkpoints" / last, alone / whole / "checkpoints" / last)


@pytest.mark.slow
def test_the_plain_process_agrees(alone: Path) -> None:
    done = subprocess.run(
        [sys.executable, "prove.py"], cwd=alone, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1] == "proven True", done.stdout + done.stderr


@pytest.mark.slow
def test_it_is_exported_as_any_run_is(alone: Path) -> None:
    from transformers import AutoModelForCausalLM

    code = "import hybridtrain as ht; print(ht.export('run', dtype='bfloat16'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=alone, capture_output=True, text=True, check=True)
    assert AutoModelForCausalLM.from_pretrained(alone / done.stdout.strip()).config.vocab_size > 249
