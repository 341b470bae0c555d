"""Bytes that are read are checked: the index when a corpus is opened, a sample of the tokens then too, every
byte by `verify_corpus`."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from hybridtrain.cli.main import main
from hybridtrain.config.schema import DataConfig, PrepareConfig
from hybridtrain.data.blend import open_data
from hybridtrain.data.corpus import Corpus
from hybridtrain.data.indexed import IndexedWriter
from hybridtrain.data.prepare import tokenize
from hybridtrain.data.verify import verify_corpus
from hybridtrain.errors import UserError
from hybridtrain.run.identity import check_fingerprints
from hybridtrain.types import Progress
from tests.data.folders import as_before_records

HEADER = struct.calcsize("<9sQBQQ")
SEQUENCES = 6


@pytest.fixture
def foreign(tmp_path) -> Path:
    """Token files of another maker: 6 sequences of 10 tokens."""
    with IndexedWriter(tmp_path / "train", dtype=np.dtype("<u2")) as writer:
        for number in range(SEQUENCES):
            writer.add(np.arange(10) + number)
    return tmp_path / "train"


def entry(section: str, number: int) -> int:
    """Where an entry of the index begins."""
    starts = {
        "sequences": 18,
        "boundaries": 26,
        "sizes": HEADER,
        "pointers": HEADER + 4 * SEQUENCES,
        "documents": HEADER + 12 * SEQUENCES,
    }
    return starts[section] + number * (4 if section == "sizes" else 8)


HOSTILE = {
    "negative pointer": ("pointers", 3, -20, "sequence 3 has 10 tokens from byte -20"),
    "backwards pointer": ("pointers", 3, 20, "sequence 3 has 10 tokens from byte 20"),
    "first pointer": ("pointers", 0, 2, "sequence 0 has 10 tokens from byte 2"),
    "negative size": ("sizes", 2, -10, "sequence 2 has -10 tokens"),
    "other size": ("sizes", 2, 9, "sequence 3 has 10 tokens from byte 60"),
    "document beyond": ("documents", 4, 99, "document 5 begins at sequence 5, before the one before it"),
    "negative document": ("documents", 0, -1, "document 0 begins at sequence -1"),
    "documents backwards": ("documents", 4, 1, "document 4 begins at sequence 1"),
    "documents end early": ("documents", SEQUENCES, 5, "its documents end at sequence 5 of 6"),
    "no boundaries": ("boundaries", 0, 0, "it has 0 document boundaries for 6 sequences"),
    "many boundaries": ("boundaries", 0, 2**62, "document boundaries for 6 sequences"),
    "fewer boundaries": ("boundaries", 0, 5, "bytes, and its header describes"),
    "many sequences": ("sequences", 0, 2**63, "truncated"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_an_index_that_contradicts_itself_is_refused_when_it_is_opened(foreign, case):
    section, number, value, words = HOSTILE[case]
    index = bytearray(foreign.with_suffix(".idx").read_bytes())
    struct.pack_into(
        "<i" if section == "sizes" else ("<Q" if value >= 2**62 else "<q"),
        index,
        entry(section, number),
        value,
    )
    foreign.with_suffix(".idx").write_bytes(index)
    for open_ in (Corpus.open, Corpus.held_out):
        with pytest.raises(UserError, match=r"train\.idx") as error:
            open_(foreign)
        assert words in str(error.value)
    assert words in verify_corpus(foreign)[0]


@pytest.mark.parametrize("change", [lambda b: b + b"\0", lambda b: b[:-2], lambda b: b + bytes(40)])
def test_sizes_of_token_files_are_held_against_one_another(foreign, change):
    tokens = foreign.with_suffix(".bin")
    assert verify_corpus(foreign) == []
    tokens.write_bytes(change(tokens.read_bytes()))
    with pytest.raises(UserError, match=r"train\.bin"):
        Corpus.open(foreign)


def test_an_index_of_several_modes_is_read(foreign):
    """Megatron's multimodal writer adds a byte for each sequence."""
    index = foreign.with_suffix(".idx")
    index.write_bytes(index.read_bytes() + bytes(SEQUENCES))
    assert Corpus.open(foreign).readers["train"].documents == SEQUENCES


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("source") / "a.jsonl"
    turns = [
        [
            {"role": "user", "content": f"what is {n}?"},
            {"role": "assistant", "content": f"it is {n} " * (n % 7 + 1)},
        ]
        for n in range(2000)
    ]
    file.write_text(
        "".join(
            json.dumps({"text": f"number {n} and more " * 8, "messages": turns[n]}) + "\n"
            for n in range(2000)
        )
    )
    return file


@pytest.fixture(params=["text", "chat"])
def prepared(request, tmp_path, source) -> Path:
    chat = {"format": "chat", "chat_template": "plain", "seq_len": 64} if request.param == "chat" else {}
    data = DataConfig(
        path=str(tmp_path / "data"), source=[str(source)], vocab_size=300, eval_fraction=0.1, **chat
    )
    return tokenize.prepare(data, options=PrepareConfig())


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(("train.", "eval.")))


def test_every_file_that_was_replaced_is_noticed(prepared):
    assert verify_corpus(prepared) == []
    for name in files(prepared):
        before = (prepared / name).read_bytes()
        # every token is 7
        (prepared / name).write_bytes(bytes([7, 0] * (len(before) // 2) + [0] * (len(before) % 2)))
        with pytest.raises(UserError, match=rf"data\.path=.*{name.partition('.')[0]}"):
            Corpus.open(prepared)
        assert any(name in problem for problem in verify_corpus(prepared))
        (prepared / name).write_bytes(before)
    assert verify_corpus(prepared) == []
    Corpus.open(prepared)


def test_one_bit_beside_the_sample_is_found_by_verify(prepared):
    tokens = bytearray((prepared / "train.bin").read_bytes())
    assert len(tokens) > 20 * 4096
    tokens[4096 + 6] ^= 1
    (prepared / "train.bin").write_bytes(tokens)
    Corpus.open(prepared)
    assert verify_corpus(prepared) == ["train.bin holds other bytes than prepare wrote"]


def test_what_an_earlier_version_wrote_is_read_verified_and_sampled(prepared):
    with_hashes = open_data(DataConfig(path=str(prepared)), timeout_s=0)
    as_before_records(prepared)
    assert verify_corpus(prepared) == []
    blend = open_data(DataConfig(path=str(prepared)), timeout_s=0)
    assert blend.fingerprint == with_hashes.fingerprint
    assert with_hashes.sample is None
    before = {"model": "m", "data": blend.fingerprint, "order": "o"}
    now = before | {"tokens": blend.sample}
    old, new = (Progress(step=1, tokens_seen=1, fingerprints=known) for known in (before, now))
    where = {"data": ("data.path", str(prepared)), "run": Path("run")}
    for progress, known in ((old, now), (new, now), (new, before)):
        assert check_fingerprints(progress, fingerprints=known, allow_data_change=False, **where) == ()
    tokens = (prepared / "train.bin").read_bytes()
    (prepared / "train.bin").write_bytes(bytes([7, 0] * (len(tokens) // 2)))
    changed = before | {"tokens": open_data(DataConfig(path=str(prepared)), timeout_s=0).sample}
    with pytest.raises(
        UserError, match="the checkpoint of step 1 was trained on other token files: they have changed since"
    ):
        check_fingerprints(new, fingerprints=changed, allow_data_change=False, **where)
    assert verify_corpus(prepared) == ["its token files are not those of the fingerprint in corpus.json"]


def test_a_prepare_that_was_interrupted_is_told_as_such(prepared, capfd):
    (prepared / ".partial").mkdir()
    (prepared / ".partial" / "plan.json").write_text("{}")
    # what stands there is whole: its prepare with overwrite has yet to replace it
    assert verify_corpus(prepared) == []
    (prepared / "corpus.json").unlink()
    assert main(["verify", str(prepared)]) == 1
    said = capfd.readouterr()
    assert (
        f"data.path={prepared}: an interrupted prepare, or one still at work: it is not complete"
        in said.out + said.err
    )
    assert "1 problem" in said.out + said.err
    with pytest.raises(UserError, match=r"hybridtrain prepare data\.path="):
        Corpus.open(prepared)


DAMAGED = {
    "not UTF-8": lambda f: f.write_bytes(b"\xff\xfe{}"),
    "cut": lambda f: f.write_bytes(f.read_bytes()[:200]),
    "a list": lambda f: f.write_text("[1]"),
    "deep": lambda f: f.write_text("[" * 200_000),
    "a folder": lambda f: (f.unlink(), f.mkdir()),
    "pointer": lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\n"),
    **{
        f"{name} {value!r}": lambda f, name=name, value=value: f.write_text(
            json.dumps(json.loads(f.read_text()) | {name: value})
        )
        for name, value in (
            ("vocab_size", "x"),
            ("fingerprint", 7),
            ("splits", []),
            ("digests", {"train.bin": 1}),
            ("digests", [1]),
            ("digests", {"train.bin": {"bytes": [1], "sample": "", "sha256": ""}}),
            ("largest_id", None),
            ("format", 9),
        )
    },
}


@pytest.mark.parametrize("prepared", ["text"], indirect=True)
def test_a_damaged_corpus_json_is_refused(prepared):
    file = prepared / "corpus.json"
    before = file.read_bytes()
    for case, damage in DAMAGED.items():
        damage(file)
        with pytest.raises(UserError, match=r"data\.path=") as error:
            Corpus.open(prepared)
        assert "corpus.json" in str(error.value) or "format" in str(error.value), case
        assert verify_corpus(prepared), case
        if file.is_dir():
            file.rmdir()
        file.write_bytes(before)


@pytest.mark.parametrize("prepared", ["chat"], indirect=True)
@pytest.mark.parametrize("name", ["train.rows.npy", "train.row_starts.npy"])
def test_a_damaged_row_index_is_refused(prepared, name):
    as_before_records(prepared)
    file = prepared / name
    good, array = file.read_bytes(), np.load(file)
    spoilt = [
        good[:100],
        b"",
        b"\x93NUMPY\x01\x00v\x00{'descr",
        good[:10] + b"{" * 118 + good[128:],
        good[:-9],
        array - 1,
        array[:1],
        array * 1.0,
    ]
    for damage in [*spoilt, *([array[::-1]] if "starts" in name else [])]:
        file.write_bytes(damage) if isinstance(damage, bytes) else np.save(file, damage)
        with pytest.raises(UserError, match=r"data\.path=.*its row index"):
            Corpus.open(prepared).count("train", seq_len=64)
    file.write_bytes(good)
    swapped = array.copy()
    swapped[0] = swapped[1]
    if name == "train.rows.npy":
        np.save(file, swapped)
        assert verify_corpus(prepared) == ["train.rows.npy has a conversation twice"]
