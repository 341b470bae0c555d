"""What a user can get wrong, as the trainer answers it: section.field, value, what is allowed, what to try; once, at once, without torch.

Mistakes in the command line alone are in tests/cli/test_mistakes.py, pure layout arithmetic in tests/plan/test_layout.py; here the whole trainer decides,
with real data, model folders and checkpoints. All cases run in one process that is told its rank and world size as by torchrun.
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

from tests.runs import arguments, corpus, finished, four_parts, on_ranks, rows, torchrun

ANSWER = """
import contextlib, io, json, sys, time
began = time.monotonic()
from hybridtrain.cli import commands
from hybridtrain.runtime import launch
launch.SPEAK_FIRST_S = 0.0
import os
answers, rank = {}, os.environ["RANK"]
for name, world_size, argv in json.load(sys.stdin):
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        if world_size == 1:
            os.environ.pop(key, None)  # one process needs no launcher
    if world_size > 1:
        os.environ.update(WORLD_SIZE=str(world_size), RANK=rank, LOCAL_RANK=rank)
    start = time.monotonic()
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            code = commands.run_command("train", argv)
        except Exception as error:
            code = repr(error)
    answers[name] = dict(code=code, err=err.getvalue(), out=out.getvalue(), seconds=time.monotonic() - start)
    if "torch" in sys.modules:
        answers[name]["err"] += "IMPORTED TORCH"
        break
json.dump(answers, sys.stdout)
"""


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
        "parallel=pp=2 x dp_replicate=2 x tp=2", "take 8 processes, but 4 were started", 4, {**PP2, "parallel__dp_replicate": 2, "parallel__tp": 2}
    ),
    "a degree that does not divide": Case("parallel=", "take a multiple of 3 processes, but 4 were started", 4, {"parallel__tp": 3}),
    "heads": Case("parallel.tp=3", "4 attention heads", 3, {"parallel__tp": 3}),
    "key/value heads that cannot be repeated": Case(
        "parallel.tp=4",
        "3 key/value heads",
        4,
        {"parallel__tp": 4, "model__config__num_attention_heads": 12, "model__config__num_key_value_heads": 3, "model__config__head_dim": 8},
    ),
    "fewer layers than stages": Case("parallel.pp=8", "the model has 4 layers", 8, {"parallel__pp": 8}),
    "fewer layers than virtual stages": Case(
        "parallel.pp=2",
        "6 stages (2 ranks x 3 each) but the model has 4 layers",
        2,
        {**PP2, "parallel__schedule": "interleaved_1f1b", "parallel__virtual_stages": 3},
    ),
    "fewer micro-batches than stages": Case("batch.global_batch_size=2", "2 micro-batches of 1 rows", 4, {"parallel__pp": 4, "batch__global_batch_size": 2}),
    "a batch that does not divide": Case("batch.global_batch_size=7", "allowed: multiples of 2", 2, {"batch__global_batch_size": 7}),
    "sequence parallel": Case("data.seq_len=33", "tp=2 equal parts", 2, {"parallel__tp": 2, "data__seq_len": 33}),
    "split backward with ZeRO-3": Case(
        "parallel.zero_stage=3",
        "zbv_zero_bubble splits the backward pass",
        4,
        {**PP2, **SHARD, "parallel__zero_stage": 3, "parallel__schedule": "zbv_zero_bubble"},
    ),
    "split backward with ZeRO-2": Case(
        "parallel.zero_stage=2", "dualpipev splits the backward pass", 4, {**PP2, **SHARD, "parallel__zero_stage": 2, "parallel__schedule": "dualpipev"}
    ),
    "interleaved micro-batches": Case(
        "batch.global_batch_size=3", "a multiple of pp=2", 2, {**PP2, "parallel__schedule": "interleaved_1f1b", "batch__global_batch_size": 3}
    ),
    "dualpipev micro-batches": Case(
        "batch.global_batch_size=3", "at least 4, one for each stage", 2, {**PP2, "parallel__schedule": "dualpipev", "batch__global_batch_size": 3}
    ),
    "stage 0 with shards": Case("parallel.zero_stage=0", "dp_shard=2 shards something", 2, SHARD),
    "shards without anybody": Case("parallel.zero_stage=3", "nothing to shard over with dp_shard=1", 2, {"parallel__zero_stage": 3}),
    "context parallel": Case("parallel.cp=2", "does not run this axis yet", 2, {"parallel__cp": 2}),
    "LoRA": Case("lora.r=8", "not supported yet", 2, {"lora__r": 8}),
    "another architecture": Case("model.config.model_type=mamba", "allowed: llama, mistral, qwen2, qwen3", 2, {"model__config__model_type": "mamba"}),
    "dropout": Case("model.config.attention_dropout=0.1", "dropout is not supported yet", 2, {"model__config__attention_dropout": 0.1}),
    "unknown key": Case("train.step=5", "try:     train.steps=VALUE", 2, {"train__step": 5}),
    "wrong type": Case("optim.lr=fast", "a value of type float", 2, {"optim__lr": "fast"}),
    "longer rows than positions": Case("data.seq_len=1024", "the model has 512 positions", 2, {"data__seq_len": 1024}),
    "no such data": Case("data.path=", "there is no such folder", 2, {}, shutil.rmtree),
    "unprepared data": Case("data.path=", "holds no prepared corpus", 2, {}, lambda p: [x.unlink() for x in p.iterdir() if x.is_file()]),
    "missing data file": Case("data.path=", "train.bin: there is no such file", 2, {}, lambda p: (p / "train.bin").unlink()),
    "empty data file": Case("data.path=", "train.bin: the file is empty", 2, {}, lambda p: os.truncate(p / "train.bin", 0)),
    "truncated tokens": Case("data.path=", "it is truncated", 2, {}, lambda p: os.truncate(p / "train.bin", 1000)),
    "truncated index": Case("data.path=", "train.idx: it is truncated", 2, {}, lambda p: os.truncate(p / "train.idx", 40)),
    "token ids beyond the vocabulary": Case("model.config.vocab_size=256", "holds token id", 2, {"model__config__vocab_size": 256}),
    "no whole row": Case(
        "data.seq_len=100000", "no whole row of training tokens", 2, {"data__seq_len": 100000, "model__config__max_position_embeddings": 100000}
    ),
    "no held-out row": Case(
        "train.eval_every=1", "holds no held-out row", 2, {"train__eval_every": 1, "data__seq_len": 5000, "model__config__max_position_embeddings": 5000}
    ),
    "phases longer than the epochs": Case(
        "schedule.decay_steps=5000", "exceed the run's", 2, {"train__steps": 0, "train__epochs": 1, "schedule": "wsd", "schedule__decay_steps": 5000}
    ),
    "no checkpoint to go on from": Case("run.resume=required", "holds no complete checkpoint", 1, {"run__resume": "required"}),
    "no such model folder": Case("model.from_pretrained=/no/such", "there is no such folder", 2, {"model__from_pretrained": "/no/such"}),
}


def answers(cases: list[tuple[str, int, list[str]]], *, rank: int = 0) -> dict[str, dict[str, Any]]:
    """What `hybridtrain train` answers to each (name, world size, argv), by name, from one process that must not import torch."""
    environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    ended = subprocess.run([sys.executable, "-c", ANSWER], input=json.dumps(cases), env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def answer(argv: list[str], *, world_size: int = 1) -> str:
    """The refusal of one command line, in its four parts."""
    given = answers([("it", world_size, argv)])["it"]
    assert given["code"] == 2, given
    assert given["out"] == "", given
    return given["err"]


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
def test_refused(answered: dict[str, dict[str, Any]], commands: list[tuple[str, int, list[str]]], name: str) -> None:
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


def test_other_ranks_keep_silent_about_what_every_rank_can_see(commands: list[tuple[str, int, list[str]]]) -> None:
    chosen = [command for command in commands if command[0] in ("unknown key", "wrong type")]
    assert {(given["code"], given["err"], given["out"]) for given in answers(chosen, rank=1).values()} == {(2, "", "")}


def test_said_within_five_seconds_and_once_under_torchrun(data: Path, tmp_path: Path) -> None:
    argv = arguments(tmp_path / "run", data, parallel__tp=2, data__seq_len=33)
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-m", "hybridtrain.train", *argv], env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert time.monotonic() - began < 5
    assert ended.returncode == 2
    process = torchrun(2, argv)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert out == ""
    assert err.count("\nhybridtrain train: data.seq_len=33") == 1 - err.startswith("hybridtrain train: data.seq_len=33"), err
    assert err.count("Traceback") <= 1, err  # torchrun's own, about a child that failed
    assert "  traceback : hybridtrain train: data.seq_len=33" in err[-1000:], "torchrun's last lines have it too"
    assert "[rank" not in err


# -- model folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "gpt2"}, "model.config.model_type=gpt2: this architecture is not supported yet"),
        ({"model_type": "llama", "attention_dropout": 0.1}, "dropout is not supported yet"),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "quantised weights is not supported yet"),
        (None, "there is no config.json in it"),
    ],
)
def test_a_model_folder_that_cannot_be_trained(data: Path, tmp_path: Path, fields: dict[str, Any] | None, words: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 300}
    if fields is not None:
        (folder / "config.json").write_text(json.dumps(sizes | fields))
    argv = [text for text in arguments(tmp_path / "run", data, model__from_pretrained=folder) if not text.startswith(("model=", "model.config"))]
    text = answer(argv)
    assert words in text
    assert "allowed: " in text


# -- runs and checkpoints ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoints at 2 and 4, and its own copy of the data."""
    root = tmp_path_factory.mktemp("trained")
    shutil.copytree(data, root / "data")
    finished(2, arguments(root / "run", root / "data", train__steps=4, checkpoint__every=2))
    return root


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may spoil."""
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def newest(run: Path) -> Path:
    return run / "checkpoints" / "step-00000004"


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated tensors": (lambda run: os.truncate(newest(run) / "__1_0.distcp", 1000), "__1_0.distcp: it has 1000 bytes instead of"),
    "missing tensors": (lambda run: (newest(run) / "__0_0.distcp").unlink(), "__0_0.distcp: it is missing"),
    "truncated metadata": (lambda run: os.truncate(newest(run) / ".metadata", 10), ".metadata: it has 10 bytes instead of"),
    "truncated marker": (lambda run: os.truncate(newest(run) / "complete.json", 10), "complete.json: it cannot be read"),
    "emptied position": (lambda run: os.truncate(newest(run) / "progress.json", 0), "progress.json: it has 0 bytes"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_the_run_left_as_it_is(trained: Path, copy: Path, damage: str) -> None:
    spoil, words = DAMAGE[damage]
    spoil(copy)
    before = contents(copy)
    text = four_parts(answer(arguments(copy, trained / "data", checkpoint__every=2)), "checkpoint")
    assert f"checkpoint={newest(copy)}: damaged: {words}" in text
    assert "IMPORTED TORCH" not in text
    assert contents(copy) == before


def test_damage_that_only_reading_shows_is_refused_on_all_ranks(trained: Path, copy: Path) -> None:
    file = newest(copy) / "__1_0.distcp"
    spoilt = bytearray(file.read_bytes())
    spoilt[len(spoilt) // 2] ^= 1
    file.write_bytes(spoilt)
    ended = on_ranks(2, arguments(copy, trained / "data", checkpoint__every=2, train__steps=6))
    assert ended.code == 2
    assert "__1_0.distcp: its content has changed (CRC32 differs)" in four_parts(ended.err, "checkpoint")
    assert json.loads((copy / "summary.json").read_text())["status"] == "failed"


def test_an_incomplete_checkpoint_is_passed_over_for_the_newest_complete_one(trained: Path, copy: Path) -> None:
    (newest(copy) / "complete.json").unlink()
    said = finished(2, arguments(copy, trained / "data", checkpoint__every=2, train__steps=4)).out
    assert "resumed   step-00000002 at step 2" in said
    assert rows(copy) == rows(trained / "run")


def test_nothing_but_incomplete_checkpoints_is_not_enough_where_one_is_required(trained: Path, copy: Path) -> None:
    for path in (copy / "checkpoints").iterdir():
        (path / "complete.json").unlink()
    assert "holds no complete checkpoint" in answer(arguments(copy, trained / "data", checkpoint__every=2, run__resume="required"))


def test_never_with_a_run_there(trained: Path, copy: Path) -> None:
    text = four_parts(answer(arguments(copy, trained / "data", checkpoint__every=2, run__resume="never")), "run.resume")
    assert "holds a run already" in text


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("run__seed", 3, "run.seed was 0 and is 3"),
        ("model__config__intermediate_size", 96, "another run: model.config.intermediate_size was 160 and is 96\n"),
        ("optim__lr", 0.1, "optim.lr was"),
    ],
)
def test_an_explicit_directory_of_another_run(trained: Path, copy: Path, option: str, value: object, words: str) -> None:
    before = contents(copy)
    text = four_parts(answer(arguments(copy, trained / "data", checkpoint__every=2, **{option: value})), "run.dir")
    assert "it holds another run" in text
    assert words in text
    assert (f"run.branch_from={copy}" in text) == (not option.startswith("model"))
    assert contents(copy) == before


def test_a_checkpoint_of_another_model(trained: Path, copy: Path, tmp_path: Path) -> None:
    """Put into the run by hand: the configuration is the run's own, so only the checkpoint can tell."""
    other = tmp_path / "other"
    finished(2, arguments(other, trained / "data", train__steps=5, model__config__intermediate_size=96))
    shutil.copytree(other / "checkpoints" / "step-00000005", copy / "checkpoints" / "step-00000005")
    text = four_parts(answer(arguments(copy, trained / "data", checkpoint__every=2)), "model")
    assert "is of another model: intermediate_size was 96 and is 160" in text


def test_other_data_in_the_same_folder_goes_on_only_when_asked_for(trained: Path, copy: Path, tmp_path: Path) -> None:
    """The path is the run's own, so only the fingerprint of the tokens can tell."""
    other = corpus(tmp_path / "other", words="comes after")
    kept = tmp_path / "kept"
    shutil.move(trained / "data", kept)
    try:
        shutil.copytree(other, trained / "data")
        argv = arguments(copy, trained / "data", checkpoint__every=2, train__steps=6)
        before = contents(copy)
        text = four_parts(answer(argv), "data.path")
        assert f"data.path={trained / 'data'}: the checkpoint of step 4 was trained on other data: they were prepared again since, or replaced" in text
        assert "run.allow_data_change=true" in text
        assert contents(copy) == before
        said = finished(2, [*argv, "run.allow_data_change=true"]).out
        assert "warning: resuming with other data: data, order" in said
        same = "model, optimizer, schedule, seed and batch are as they were; the data are other than before:"
        assert f"resumed   step-00000004 at step 4, 1024 tokens; {same} {trained / 'data'}" in said
        assert [row["step"] for row in rows(copy)] == list(range(1, 7))
    finally:
        shutil.rmtree(trained / "data")
        shutil.move(kept, trained / "data")
