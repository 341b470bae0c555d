"""Several processes: a worker or all of them killed, a worker that fails, and the same bytes in the end;
conversations in pieces."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from hybridtrain.config.schema import DataConfig, PrepareConfig
from hybridtrain.data.indexed import IndexedReader
from hybridtrain.data.prepare import chat, pieces, tokenize
from hybridtrain.data.prepare.conversations import read
from hybridtrain.data.prepare.template import PLAIN, Template
from hybridtrain.errors import UserError

PROGRAM = """
import json, sys
from hybridtrain.config.schema import DataConfig, PrepareConfig
from hybridtrain.data.prepare import pieces, tokenize
if __name__ == "__main__":
    pieces.MIN_PIECE_BYTES = 40_000
    tokenize.prepare(DataConfig(**json.loads(sys.argv[1])), options=PrepareConfig(workers=2))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """1.5 MB of JSONL."""
    generator = random.Random(2)
    words = [f"word{number}" for number in range(500)]
    path = tmp_path_factory.mktemp("source") / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": " ".join(generator.choices(words, k=400))}) + "\n" for _ in range(500))
    )
    return path


@pytest.fixture(scope="module")
def reference(tmp_path_factory, source) -> Path:
    """In this process, and with other pieces."""
    data = DataConfig(
        path=str(tmp_path_factory.mktemp("reference") / "data"),
        source=[str(source)],
        vocab_size=600,
        eval_fraction=0.1,
    )
    return tokenize.prepare(data, options=PrepareConfig())


def start(folder: Path, source: Path, reference: Path) -> subprocess.Popen:
    """A process group of its own, which can be killed whole."""
    data = {
        "path": str(folder),
        "source": [str(source)],
        "tokenizer": str(reference / "tokenizer"),
        "eval_fraction": 0.1,
    }
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps(data)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def complete(folder: Path) -> list[Path]:
    return [path for path in folder.glob(".partial/piece-*") if path.suffix == ""]


def wait_for_pieces(folder: Path, process: subprocess.Popen, *, more_than: int) -> None:
    deadline = time.monotonic() + 120
    while len(complete(folder)) <= more_than and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def tokens(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".bin", ".idx", ".npy")
    }


def finish(folder: Path, source: Path, reference: Path) -> None:
    """The same command again ends with the same bytes, and keeps the pieces there are."""
    kept = {path: path.stat().st_ino for path in complete(folder)}
    process = start(folder, source, reference)
    while process.poll() is None:
        assert all(not path.exists() or path.stat().st_ino == inode for path, inode in kept.items())
        time.sleep(0.01)
    said = process.communicate()[1]
    assert process.returncode == 0, said
    assert "continuing an interrupted prepare" in said
    assert tokens(folder) == tokens(reference)


def test_the_whole_group_is_killed(tmp_path, source, reference):
    process = start(tmp_path / "data", source, reference)
    wait_for_pieces(tmp_path / "data", process, more_than=3)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert 3 < len(complete(tmp_path / "data")) < 100
    finish(tmp_path / "data", source, reference)


def test_only_the_starting_process_is_killed(tmp_path, source, reference):
    """Its workers notice and end; the next call is not disturbed."""
    process = start(tmp_path / "data", source, reference)
    wait_for_pieces(tmp_path / "data", process, more_than=3)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    finish(tmp_path / "data", source, reference)
    assert not psutil.wait_procs(workers, timeout=20)[1]


def test_one_worker_is_killed(tmp_path, source, reference):
    process = start(tmp_path / "data", source, reference)
    wait_for_pieces(tmp_path / "data", process, more_than=3)
    workers = [
        child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())
    ]
    assert len(workers) == 2
    workers[0].kill()
    said = process.communicate()[1]
    assert process.returncode == 1
    assert re.search(
        rf"UserError: prepare\.workers=2: one of the processes ended by SIGKILL while it read {source}", said
    )
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    finish(tmp_path / "data", source, reference)


def peak_memory(folder: Path, source: Path, reference: Path) -> int:
    """Bytes: the largest sum of the resident memory of `prepare` and its workers, sampled."""
    process, peak = start(folder, source, reference), 0
    tree = psutil.Process(process.pid)
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            peak = max(peak, sum(one.memory_info().rss for one in [tree, *tree.children(recursive=True)]))
        time.sleep(0.05)
    assert process.returncode == 0, process.communicate()[1]
    return peak


@pytest.mark.table
def test_memory_does_not_grow_with_the_corpus(tmp_path, source, reference):
    text = source.read_bytes()
    peaks = {}
    for times in (2, 30):  # 3 and 45 MB, some of it in one line of 3 MB
        big = tmp_path / f"{times}.jsonl"
        big.write_bytes(text * times + json.dumps({"text": " ".join(["a word"] * 400_000)}).encode())
        peaks[times] = peak_memory(tmp_path / str(times), big, reference)
    assert peaks[30] < peaks[2] + (30 << 20)


def conversations(count: int) -> list[list[dict[str, str]]]:
    def turn(number: int) -> list[dict[str, str]]:
        return [
            {"role": "user", "content": f"what is {number} and {number}?"},
            {"role": "assistant", "content": f"it is {2 * number}. " * (number % 5 + 1)},
        ]

    return [
        [message for part in range(number % 3 + 1) for message in turn(number + part)]
        for number in range(count)
    ]


@pytest.fixture
def talk(tmp_path) -> Path:
    path = tmp_path / "talk.jsonl"
    lines = [json.dumps({"messages": one, "source": "made up"}) for one in conversations(90)]
    path.write_text("\n".join([*lines[:4], '{"messages": []}', *lines[4:]]) + "\n")
    return path


def chat_settings(folder: Path, source: Path, **fields: object) -> DataConfig:
    values = {
        "format": "chat",
        "chat_template": "plain",
        "vocab_size": 320,
        "eval_fraction": 0.2,
        "seq_len": 64,
    } | fields
    return DataConfig(path=str(folder), source=[str(source)], **values)


def test_conversations_have_loss_masks_and_rows(tmp_path, talk, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.setattr(pieces, "MIN_PIECE_BYTES", 5000)
    made = tokenize.prepare(chat_settings(tmp_path / "data", talk), options=PrepareConfig())
    template = Template(AutoTokenizer.from_pretrained(made / "tokenizer"), name="")
    talks = [read({"messages": one}, key="messages") for one in conversations(90)]
    expected = [
        sample for each in chat.encode(talks, template=template, turns="all") for sample in each.samples
    ]
    found = []
    facts = json.loads((made / "corpus.json").read_text())
    assert (facts["kind"], facts["seq_len"]) == ("chat", 64)
    for split in ("train", "eval"):
        ids, mask = IndexedReader(made / split), IndexedReader(made / f"{split}.loss")
        assert mask.sizes.tolist() == ids.sizes.tolist()
        for end, size in zip(np.cumsum(ids.sizes), ids.sizes, strict=True):
            found.append((ids.read(end - size, end).tolist(), mask.read(end - size, end).tolist()))
        figures = facts["splits"][split]
        rows_of = [
            mask.read(end - size, end)[:65] for end, size in zip(np.cumsum(ids.sizes), ids.sizes, strict=True)
        ]
        assert (figures["loss_tokens"], figures["kept_tokens"]) == (
            sum(int(row[1:].sum()) for row in rows_of),
            sum(map(len, rows_of)),
        )
        starts, rows = np.load(made / f"{split}.row_starts.npy"), np.load(made / f"{split}.rows.npy")
        assert figures["rows"] == len(starts) - 1
        assert sorted(rows.tolist()) == list(range(ids.documents))
    assert facts["notes"] == {"records without any message, left out": [1, f"{talk} line 5"]}
    assert (facts["conversations"], facts["forms"], facts["unread"]) == (
        90,
        {"messages of role and content": 90},
        {"source": 90},
    )
    assert sorted(found) == sorted((ids.tolist(), mask.tolist()) for ids, mask in expected)
    assert 5 < facts["splits"]["eval"]["documents"] < 35


@pytest.mark.parametrize("kind", ["parquet", "workers"])
def test_conversations_of_parquet_and_of_several_processes_are_the_same(tmp_path, talk, kind, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(pieces, "MIN_PIECE_BYTES", 5000)
    first = tokenize.prepare(chat_settings(tmp_path / "first", talk), options=PrepareConfig())
    source, options = talk, PrepareConfig(workers=2)
    if kind == "parquet":
        source, options = tmp_path / "talk.parquet", PrepareConfig()
        with_names = [[{**message, "name": None} for message in one] for one in conversations(90)]
        pyarrow.parquet.write_table(pyarrow.table({"messages": with_names}), source, row_group_size=9)
    again = tokenize.prepare(
        chat_settings(tmp_path / "again", source, tokenizer=str(first / "tokenizer")), options=options
    )
    assert tokens(again) == tokens(first)


def test_text_after_conversations_leaves_nothing_of_them(tmp_path, talk):
    made = tokenize.prepare(chat_settings(tmp_path / "data", talk), options=PrepareConfig())
    (tmp_path / "a.txt").write_text("plain text, no conversation")
    data = DataConfig(path=str(made), source=[str(tmp_path / "a.txt")], vocab_size=300)
    tokenize.prepare(data, options=PrepareConfig(overwrite=True))
    assert sorted(tokens(made)) == ["train.bin", "train.idx"]


BAD_TALK = {
    "no list": ({"messages": "hello"}, "its field 'messages' is text, no list of messages"),
    "no role": ({"messages": [{"content": "x"}]}, "message 0 is no object with a role"),
    "no answer": ({"messages": [{"role": "user", "content": "x"}]}, "it has no assistant message"),
    "no field": ({"text": "x"}, "its field 'messages' is missing or null"),
}


@pytest.mark.parametrize("case", BAD_TALK)
def test_bad_conversations_are_named(tmp_path, talk, case):
    record, problem = BAD_TALK[case]
    lines = talk.read_text().splitlines()
    lines.insert(20, json.dumps(record))
    talk.write_text("\n".join(lines))
    with pytest.raises(UserError, match=rf"talk\.jsonl line 21: {problem}[\s\S]*data\.messages_key"):
        tokenize.prepare(chat_settings(tmp_path / "data", talk), options=PrepareConfig())
    made = tokenize.prepare(chat_settings(tmp_path / "data", talk), options=PrepareConfig(skip_bad=True))
    assert json.loads((made / "corpus.json").read_text())["bad_records"] == 1


def test_a_conversation_that_the_template_refuses_is_named(tmp_path, talk):
    """A template that knows two roles; the record with a third is in the middle of a batch."""
    from transformers import AutoTokenizer

    strict = AutoTokenizer.from_pretrained(
        tokenize.prepare(chat_settings(tmp_path / "first", talk), options=PrepareConfig()) / "tokenizer"
    )
    strict.chat_template = PLAIN.replace(
        "{% for message in messages %}",
        (
            "{% for message in messages %}{% if message['role'] == 'system' %}"
            "{{ raise_exception('no system') }}{% endif %}"
        ),
    )
    strict.save_pretrained(tmp_path / "strict")
    lines = talk.read_text().splitlines()
    lines.insert(30, json.dumps({"messages": [{"role": "system", "content": "be"}, *conversations(1)[0]]}))
    talk.write_text("\n".join(lines))
    data = chat_settings(tmp_path / "data", talk, tokenizer=str(tmp_path / "strict"), chat_template="own")
    with pytest.raises(
        UserError,
        match=(
            r"talk\.jsonl line 31: the chat template of data\.tokenizer=\S*/strict fails "
            "on a conversation of system, user, assistant: TemplateError: no system"
        ),
    ):
        tokenize.prepare(data, options=PrepareConfig())
    made = tokenize.prepare(data, options=PrepareConfig(skip_bad=True))
    facts = json.loads((made / "corpus.json").read_text())
    assert facts["bad_records"] == 1
    assert sum(split["documents"] for split in facts["splits"].values()) == 90


@pytest.mark.parametrize("kind", ["train", "folder"])
def test_a_tokenizer_without_a_template_is_refused_for_conversations(tmp_path, talk, reference, kind):
    data = chat_settings(
        tmp_path / "data",
        talk,
        chat_template="own",
        tokenizer="train" if kind == "train" else str(reference / "tokenizer"),
    )
    with pytest.raises(
        UserError, match=r"data\.tokenizer=.*no chat template[\s\S]*data\.chat_template=plain"
    ):
        tokenize.prepare(data, options=PrepareConfig())
