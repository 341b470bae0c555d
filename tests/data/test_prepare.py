"""`hybridtrain prepare`: what it writes, and what it refuses."""

import fcntl
import json
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hybridtrain.config.schema import DataConfig, PrepareConfig, PrepareRoot
from hybridtrain.data.corpus import Corpus
from hybridtrain.data.indexed import IndexedReader
from hybridtrain.data.prepare import cuts, sources, statistics, tokenize, tokenizer
from hybridtrain.errors import UserError
from tests.data.texts import RECIPE, settings, write_texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"), documents=40, words=300)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, texts) -> Path:
    return tokenize.prepare(
        settings(tmp_path_factory.mktemp("prepared") / "data", texts), options=PrepareConfig()
    )


def text_of(source: sources.Source) -> str:
    return Path(source.path).read_bytes().decode("utf-8-sig", errors="replace")


def test_token_files_decode_to_the_documents(prepared, texts):
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(prepared / "tokenizer")
    facts = json.loads((prepared / "corpus.json").read_text())
    listed = sources.listing(settings(prepared, texts)).sources
    names = [
        ".lock",
        ".prepare.json",
        "corpus.json",
        "eval.bin",
        "eval.idx",
        "speed.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ]
    assert sorted(
        path.relative_to(prepared).as_posix() for path in prepared.rglob("*") if path.is_file()
    ) == [*names, "train.bin", "train.idx"]
    largest = 0
    for split, held_out in (("train", False), ("eval", True)):
        reader = IndexedReader(prepared / split)
        expected = [text_of(source) for source in listed if source.held_out is held_out]
        ends = np.cumsum(reader.sizes)
        for end, size, text in zip(ends, reader.sizes, expected, strict=True):
            tokens = reader.read(end - size, end)
            assert tokens[-1] == saved.eos_token_id == facts["eos_id"]
            assert saved.decode(tokens[:-1]) == text
            assert np.array_equal(tokens[:-1], saved(text, add_special_tokens=False)["input_ids"])
        sizes = sorted(reader.sizes.tolist())
        assert (facts["splits"][split]["documents"], facts["splits"][split]["tokens"]) == (
            len(expected),
            reader.tokens,
        )
        lengths = facts["splits"][split]["lengths"]
        assert (lengths["min"], lengths["max"], lengths["median"]) == (
            sizes[0],
            sizes[-1],
            sizes[(len(sizes) + 1) // 2 - 1],
        )
        assert lengths["p90"] == sizes[-(len(sizes) // 10) - 1]
        assert lengths["mean"] == pytest.approx(reader.tokens / len(sizes), abs=0.05)
        largest = max(largest, int(reader.read(0, reader.tokens).max()))
    assert facts["largest_id"] == largest
    assert facts["vocab_size"] == len(saved) == 400
    assert facts["text_bytes"] == sum(path.stat().st_size for path in texts.rglob("*.txt"))
    assert saved.eos_token == saved.bos_token == "<|endoftext|>"


def test_prepared_already_returns_at_once_and_writes_nothing(prepared, texts, capsys):
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    start = time.perf_counter()
    assert tokenize.prepare(settings(prepared, texts), options=PrepareConfig()) == prepared
    assert time.perf_counter() - start < 0.5
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == before
    assert "prepared already" in capsys.readouterr().err


def test_other_settings_are_refused_unless_overwritten(tmp_path, texts):
    first = tokenize.prepare(settings(tmp_path / "data", texts), options=PrepareConfig())
    old = Corpus.open(first)
    with pytest.raises(
        UserError, match=r"data\.vocab_size=300: .* was prepared with 400[\s\S]*prepare\.overwrite=true"
    ):
        tokenize.prepare(settings(tmp_path / "data", texts, vocab_size=300), options=PrepareConfig())
    assert Corpus.open(first).fingerprint == old.fingerprint
    new = Corpus.open(
        tokenize.prepare(
            settings(tmp_path / "data", texts, vocab_size=300, eval_fraction=0.0),
            options=PrepareConfig(overwrite=True),
        )
    )
    assert new.fingerprint != old.fingerprint
    assert new.vocab_size == 300
    assert "eval" not in new.readers
    assert not (first / "eval.bin").exists()


def test_fingerprint_is_of_the_tokens_not_of_the_place(tmp_path, prepared, texts):
    copy = shutil.copytree(texts, tmp_path / "moved" / texts.name)
    same = Corpus.open(tokenize.prepare(settings(tmp_path / "same", copy), options=PrepareConfig()))
    assert same.fingerprint == Corpus.open(prepared).fingerprint
    changed = copy / "part0" / "0.txt"
    changed.write_bytes(changed.read_bytes()[:-20])
    other = Corpus.open(tokenize.prepare(settings(tmp_path / "other", copy), options=PrepareConfig()))
    assert other.fingerprint != same.fingerprint


def test_a_tokenizer_folder_and_no_end_of_text(tmp_path, prepared, texts):
    folder = tokenize.prepare(
        settings(tmp_path / "data", texts, tokenizer=str(prepared / "tokenizer"), append_eos=False),
        options=PrepareConfig(),
    )
    plain, with_eos = Corpus.open(folder), Corpus.open(prepared)
    assert plain.vocab_size == with_eos.vocab_size
    for split in ("train", "eval"):
        ours, theirs = plain.readers[split], with_eos.readers[split]
        tokens = theirs.read(0, theirs.tokens)
        assert np.array_equal(ours.read(0, ours.tokens), np.delete(tokens, np.cumsum(theirs.sizes) - 1))


def test_long_documents_are_cut_where_it_changes_no_token(prepared, monkeypatch):
    from tokenizers import Tokenizer

    text = "".join(
        Path(sys.modules[name].__file__).read_text() for name in ("argparse", "typing", "subprocess")
    )
    monkeypatch.setattr(cuts, "CHUNK_CHARS", 500)
    fast = Tokenizer.from_file(str(prepared / "tokenizer" / "tokenizer.json"))
    whole = fast.encode(text, add_special_tokens=False).ids
    parts = list(cuts.Cutter(lambda one: fast.encode(one, add_special_tokens=False).ids).parts(text))
    assert len(parts) > 50
    assert "".join(parts) == text
    monkeypatch.setattr(tokenizer, "GROUP_CHARS", 3000)
    short, long, empty = (
        one.samples[0][0] for one in tokenizer.encoder(prepared, RECIPE)(["short", text, ""])
    )
    assert long.tolist() == whole
    assert 0 < len(short) < 6
    assert empty.size == 0


def test_stdlib_is_code_without_tests():
    found = sources.listing(DataConfig(source=["stdlib"])).sources
    names = [source.name for source in found]
    assert names == sorted(names)
    assert {"stdlib/argparse.py", "stdlib/json/decoder.py"} <= set(names)
    assert not [
        name
        for name in names
        if {"site-packages", "test", "tests", "idle_test", "__pycache__"} & set(name.split("/"))
    ]
    assert 5e6 < sum(source.size for source in found) < 40e6
    assert 0.01 < sum(source.held_out is True for source in found) / len(found) < 0.04


def test_sources_files_folders_and_patterns(tmp_path):
    write_texts(tmp_path / "texts", documents=6, words=5)
    (tmp_path / "texts" / "note.md").write_text("no document")
    (tmp_path / "texts" / "empty.txt").write_text("")
    (tmp_path / "single.md").write_text(
        "\ufefftext after a byte order mark \udc80".encode("utf-8", "surrogateescape").decode(
            "utf-8", "replace"
        )
    )
    entries = [tmp_path / "single.md", tmp_path / "texts" / "part1", tmp_path / "texts" / "**" / "*.txt"]
    found = sources.listing(DataConfig(source=[str(entry) for entry in entries], eval_fraction=0.0)).sources
    assert [source.name for source in found] == [
        "single.md",
        "part1/1.txt",
        "part1/4.txt",
        "part0/0.txt",
        "part0/3.txt",
        "part2/2.txt",
        "part2/5.txt",
    ]
    assert text_of(found[0]) == "text after a byte order mark \ufffd"
    assert not any(source.held_out for source in found)


@pytest.mark.parametrize(("fraction", "documents"), [(0.0001, 2), (0.9999, 2), (0.5, 40), (0.0, 5), (0.5, 1)])
def test_held_out_documents(tmp_path, fraction, documents):
    write_texts(tmp_path, documents=documents, words=3)
    found = sources.listing(DataConfig(source=[str(tmp_path)], eval_fraction=fraction)).sources
    held_out = {source.name for source in found if source.held_out}
    if fraction == 0 or documents == 1:
        assert not held_out
    else:
        assert 0 < len(held_out) < documents
    if documents == 40:
        assert 10 < len(held_out) < 30
        (tmp_path / "part0" / "new.txt").write_text("one more")
        again = sources.listing(DataConfig(source=[str(tmp_path)], eval_fraction=fraction)).sources
        assert {source.name for source in again if source.held_out} - {
            f"{tmp_path.name}/part0/new.txt"
        } == held_out


REFUSALS = {
    "no path": ({"path": ""}, r"data\.path=''"),
    "no source": ({"source": []}, r"data\.source=\[\]: nothing to read"),
    "missing source": (
        {"source": ["/nowhere/at/all"]},
        r"data\.source=/nowhere/at/all: there is no such file",
    ),
    "nothing matches": (
        {"pattern": "*.nothing"},
        r"data\.source=.*no text in it \(data\.pattern=\*\.nothing\)",
    ),
    "fraction": ({"eval_fraction": 1.0}, r"data\.eval_fraction=1\.0"),
    "vocabulary": ({"vocab_size": 200}, r"data\.vocab_size=200: .*\n.*257 or more"),
    "tokenizer": (
        {"tokenizer": "/nowhere/tokenizer"},
        r"data\.tokenizer=/nowhere/tokenizer: it cannot be loaded",
    ),
    "a file as folder": ({"path": __file__}, r"data\.path=.*test_prepare"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(tmp_path, texts, case):
    fields, message = REFUSALS[case]
    data = settings(tmp_path / "data", texts)
    for name, value in fields.items():
        setattr(data, name, value)
    with pytest.raises(UserError, match=message) as error:
        tokenize.prepare(data, options=PrepareConfig())
    assert "allowed:" in str(error.value)
    assert "try:" in str(error.value)


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path, texts, prepared):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(prepared / "tokenizer" / "tokenizer.json"))
    ).save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match=r"data\.append_eos=True: .*no end-of-text token"):
        tokenize.prepare(
            settings(tmp_path / "data", texts, tokenizer=str(tmp_path / "bare")), options=PrepareConfig()
        )


def test_two_at_once_are_refused(tmp_path, texts):
    folder = tmp_path / "data"
    folder.mkdir()
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another prepare is writing here"):
            tokenize.prepare(settings(folder, texts), options=PrepareConfig())


def test_damaged_text_is_counted(tmp_path):
    source = write_texts(tmp_path / "texts", documents=3, words=100)
    (source / "part0" / "bad.txt").write_bytes(b"caf\xe9 " + b"words " * 50)
    tokenize.prepare(settings(tmp_path / "data", source), options=PrepareConfig())
    assert (
        f"1 documents with U+FFFD or bytes that are no text, first {source / 'part0' / 'bad.txt'}"
        in statistics.table(tmp_path / "data")
    )


def test_columns_keep_apart_whatever_their_figures(tmp_path, prepared):
    facts = json.loads((prepared / "corpus.json").read_text())
    facts["splits"]["train"] |= {
        "documents": 10**12,
        "tokens": 10**15,
        "lengths": dict.fromkeys(facts["splits"]["train"]["lengths"], 622484622.5),
    }
    (tmp_path / "corpus.json").write_text(json.dumps(facts))
    head, train, held_out, *_ = statistics.table(tmp_path).splitlines()
    assert (
        len(train.split())
        == len(held_out.split())
        == len(head.removesuffix("tokens per document").split()) + 1
    )
    ends = [{match.end() for match in re.finditer(r"\S+", line)} for line in (train[11:], held_out[11:])]
    assert ends[0] == ends[1] <= {match.end() for match in re.finditer(r"\S+", head[11:])}


def test_the_command_prints_what_the_folder_holds(prepared, texts, capsys):
    config = PrepareRoot()
    config.data = settings(prepared, texts)
    assert tokenize.run(config) == 0
    out = capsys.readouterr().out
    splits = json.loads((prepared / "corpus.json").read_text())["splits"]
    for split in ("train", "eval"):
        line = next(line.split() for line in out.splitlines() if line.startswith(split))
        figures = splits[split]
        assert line[1:] == [
            f"{value:,}" for value in (figures["documents"], figures["tokens"], *figures["lengths"].values())
        ]
    assert f"folder     {prepared}" in out
    assert "vocabulary 400" in out
    assert re.search(r"speed      [\d,]+ tokens/s, [\d.]+ MB/s", out)
