"""What a user can get wrong, as the trainer answers it: section.field, value, what is allowed, what to try;
once, at once, without torch.

Mistakes in the command line alone are in tests/cli/test_mistakes.py, pure layout arithmetic in
tests/plan/test_layout.py, what is wrong with a run in test_bad_run_dir.py; here the whole trainer decides,
with real data and model folders. All cases run in one process that is told its rank and
world size as by torchrun.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from tests.runs import arguments, four_parts, torchrun
from tests.training.answers import answer, answers


class Case(NamedTuple):
    field: str
    """section.field=value, as the answer begins."""
    words: str
    world_size: int = 2
    options: Mapping[str, Any] = MappingProxyType({})
    spoil: Callable[[Path], object] | None = None
    """Spoils a copy of the data."""


def edit(folder: Path, **changes: object) -> None:
    facts = json.loads((folder / "corpus.json").read_text())
    (folder / "corpus.json").write_text(json.dumps(facts | changes))


PP2 = {"parallel__pp": 2}
SHARD = {"parallel__dp_replicate": 1, "parallel__dp_shard": 2}
CASES = {
    "degrees that do not multiply out": Case(
        "parallel=pp=2 x dp_replicate=2 x tp=2",
        "take 8 processes, but 4 were started",
        4,
        {**PP2, "parallel__dp_replicate": 2, "parallel__tp": 2},
    ),
    "a degree that does not divide": Case(
        "parallel=", "take a multiple of 3 processes, but 4 were started", 4, {"parallel__tp": 3}
    ),
    "heads": Case("parallel.tp=3", "4 attention heads", 3, {"parallel__tp": 3}),
    "key/value heads that cannot be repeated": Case(
        "parallel.tp=4",
        "3 key/value heads",
        4,
        {
            "parallel__tp": 4,
            "model__config__num_attention_heads": 12,
            "model__config__num_key_value_heads": 3,
            "model__config__head_dim": 8,
        },
    ),
    "fewer layers than stages": Case("parallel.pp=8", "the model has 4 layers", 8, {"parallel__pp": 8}),
    "fewer layers than virtual stages": Case(
        "parallel.pp=2",
        "6 stages (2 ranks x 3 each) but the model has 4 layers",
        2,
        {**PP2, "parallel__schedule": "interleaved_1f1b", "parallel__virtual_stages": 3},
    ),
    "fewer micro-batches than stages": Case(
        "batch.global_batch_size=2",
        "2 micro-batches of 1 rows",
        4,
        {"parallel__pp": 4, "batch__global_batch_size": 2},
    ),
    "a batch that does not divide": Case(
        "batch.global_batch_size=7", "allowed: multiples of 2", 2, {"batch__global_batch_size": 7}
    ),
    "sequence parallel": Case(
        "data.seq_len=33",
        "tp=2 equal parts",
        2,
        {"parallel__tp": 2, "data__seq_len": 33, "parallel__sequence_parallel": "true"},
    ),
    "split backward with ZeRO-3": Case(
        "parallel.zero_stage=3",
        "zbv_zero_bubble splits the backward pass",
        4,
        {**PP2, **SHARD, "parallel__zero_stage": 3, "parallel__schedule": "zbv_zero_bubble"},
    ),
    "split backward with ZeRO-2": Case(
        "parallel.zero_stage=2",
        "dualpipev splits the backward pass",
        4,
        {**PP2, **SHARD, "parallel__zero_stage": 2, "parallel__schedule": "dualpipev"},
    ),
    "interleaved micro-batches": Case(
        "batch.global_batch_size=3",
        "a multiple of pp=2",
        2,
        {**PP2, "parallel__schedule": "interleaved_1f1b", "batch__global_batch_size": 3},
    ),
    "dualpipev micro-batches": Case(
        "batch.global_batch_size=3",
        "at least 4, one for each stage",
        2,
        {**PP2, "parallel__schedule": "dualpipev", "batch__global_batch_size": 3},
    ),
    "stage 0 with shards": Case("parallel.zero_stage=0", "dp_shard=2 shards something", 2, SHARD),
    "shards without anybody": Case(
        "parallel.zero_stage=3", "nothing to shard over with dp_shard=1", 2, {"parallel__zero_stage": 3}
    ),
    "context parallel": Case("parallel.cp=2", "does not run this axis yet", 2, {"parallel__cp": 2}),
    "LoRA": Case("lora.r=8", "no such option", 2, {"lora__r": 8}),
    "another architecture": Case(
        "model.config.model_type=bert",
        "an encoder",
        2,
        {"model__config__model_type": "bert"},
    ),
    "dropout": Case(
        "model.config.attention_dropout=0.1",
        "random numbers of an attention kernel",
        2,
        {"model__config__attention_dropout": 0.1},
    ),
    "unknown key": Case("train.step=5", "try:     train.steps=VALUE", 2, {"train__step": 5}),
    "wrong type": Case("optim.lr=fast", "a value of type float", 2, {"optim__lr": "fast"}),
    "longer rows than positions": Case(
        "data.seq_len=1024", "the model has 512 positions", 2, {"data__seq_len": 1024}
    ),
    "no such data": Case("data.path=", "there is no such folder", 2, {}, shutil.rmtree),
    "unprepared data": Case(
        "data.path=",
        "holds no prepared corpus",
        2,
        {},
        lambda p: [x.unlink() for x in p.iterdir() if x.is_file()],
    ),
    "missing data file": Case(
        "data.path=", "train.bin: there is no such file", 2, {}, lambda p: (p / "train.bin").unlink()
    ),
    "empty data file": Case(
        "data.path=", "train.bin: the file is empty", 2, {}, lambda p: os.truncate(p / "train.bin", 0)
    ),
    "truncated tokens": Case(
        "data.path=", "it is truncated", 2, {}, lambda p: os.truncate(p / "train.bin", 1000)
    ),
    "truncated index": Case(
        "data.path=", "train.idx: it is truncated", 2, {}, lambda p: os.truncate(p / "train.idx", 40)
    ),
    "token ids beyond the vocabulary": Case(
        "model.config.vocab_size=256", "holds token id", 2, {"model__config__vocab_size": 256}
    ),
    "no whole row": Case(
        "data.seq_len=100000",
        "no whole row of training tokens",
        2,
        {"data__seq_len": 100000, "model__config__max_position_embeddings": 100000},
    ),
    "no held-out row": Case(
        "train.eval_every=1",
        "holds no held-out row",
        2,
        {"train__eval_every": 1, "data__seq_len": 5000, "model__config__max_position_embeddings": 5000},
    ),
    "phases longer than the epochs": Case(
        "schedule.decay_steps=5000",
        "exceed the run's",
        2,
        {"train__steps": 0, "train__epochs": 1, "schedule": "wsd", "schedule__decay_steps": 5000},
    ),
    "no checkpoint to go on from": Case(
        "run.resume=required", "holds no complete checkpoint", 1, {"run__resume": "required"}
    ),
    "no such model folder": Case(
        "model.from_pretrained=/no/such", "there is no such folder", 2, {"model__from_pretrained": "/no/such"}
    ),
}


@pytest.fixture(scope="module")
def commands(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int, list[str]]]:
    folder = tmp_path_factory.mktemp("cases")
    made = []
    for number, (name, case) in enumerate(CASES.items()):
        path = data
        if case.spoil:
            path = Path(shutil.copytree(data, folder / f"data-{number}"))
            case.spoil(path)
        made.append((name, case.world_size, arguments(folder / f"run-{number}", path, **case.options)))
    return made


@pytest.fixture(scope="module")
def answered(commands: list[tuple[str, int, list[str]]]) -> dict[str, dict[str, Any]]:
    return answers(commands)


@pytest.mark.parametrize("name", CASES)
def test_refused(
    answered: dict[str, dict[str, Any]], commands: list[tuple[str, int, list[str]]], name: str
) -> None:
    given, case = answered[name], CASES[name]
    assert given["code"] == 2, given
    assert given["out"] == ""
    text = four_parts(given["err"], case.field.partition("=")[0])
    assert text.startswith(f"hybridtrain train: {case.field}"), text
    assert case.words in text, text
    assert "IMPORTED TORCH" not in text
    assert given["seconds"] < 3
    run = next(argv for named, _, argv in commands if named == name)[2].partition("=")[2]
    assert not Path(run).exists(), "nothing is written for a run that never was"


def test_other_ranks_keep_silent_about_what_every_rank_can_see(
    commands: list[tuple[str, int, list[str]]],
) -> None:
    chosen = [command for command in commands if command[0] in ("unknown key", "wrong type")]
    assert {(given["code"], given["err"], given["out"]) for given in answers(chosen, rank=1).values()} == {
        (2, "", "")
    }


def test_said_within_five_seconds_and_once_under_torchrun(data: Path, tmp_path: Path) -> None:
    options = {"parallel__tp": 2, "parallel__sequence_parallel": "true", "data__seq_len": 33}
    argv = arguments(tmp_path / "run", data, **options)
    environment = {
        **os.environ,
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", "hybridtrain.train", *argv],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert time.monotonic() - began < 5
    assert ended.returncode == 2
    process = torchrun(2, argv)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert out == ""
    assert err.count("\nhybridtrain train: data.seq_len=33") == 1 - err.startswith(
        "hybridtrain train: data.seq_len=33"
    ), err
    assert err.count("Traceback") <= 1, err  # torchrun's own, about a child that failed
    assert "  traceback : hybridtrain train: data.seq_len=33" in err[-1000:], (
        "torchrun's last lines have it too"
    )
    assert "[rank" not in err


# -- model folders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "dit"}, "model.config.model_type=dit: this architecture is not supported yet"),
        ({"model_type": "hrm_text"}, "model.config.model_type=hrm_text: no list of"),
        ({"model_type": "llama", "attention_dropout": 0.1}, "random numbers of an attention kernel"),
        (
            {"model_type": "llama", "quantization_config": {"bits": 4}},
            "quantized weights is not supported yet",
        ),
        (None, "there is no config.json in it"),
    ],
)
def test_a_model_folder_that_cannot_be_trained(
    data: Path, tmp_path: Path, fields: dict[str, Any] | None, words: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 300,
    }
    if fields is not None:
        (folder / "config.json").write_text(json.dumps(sizes | fields))
    argv = [
        text
        for text in arguments(tmp_path / "run", data, model__from_pretrained=folder)
        if not text.startswith(("model=", "model.config"))
    ]
    text = answer(argv)
    assert words in text
    assert "allowed: " in text
