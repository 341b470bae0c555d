"""A folder that is prepared already: what has changed since, in it or in its sources, is noticed."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest

from hybridtrain.cli import commands
from hybridtrain.data.corpus import Corpus
from hybridtrain.data.prepare import statistics, tokenize
from hybridtrain.data.verify import verify_corpus
from hybridtrain.errors import UserError
from tests.data.folders import AGAIN, NEW, as_before_records, contents, few_texts, refused, settings


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return few_texts(tmp_path / "texts")


def test_a_prepared_folder_is_only_read(tmp_path, texts, capsys):
    """So that it may lie on a disk that cannot be written."""
    folder = tokenize.prepare(settings(tmp_path / "data", texts), options=NEW)
    (folder / ".lock").unlink()
    tokenize.prepare(settings(folder, texts), options=NEW)
    assert "is prepared already (" in capsys.readouterr().err
    assert not (folder / ".lock").exists()


CHANGES = {
    "appended": (lambda t: (t / "1.txt").write_text("more " * 500), r"1 changed \(texts/1\.txt\) since"),
    "touched": (lambda t: os.utime(t / "1.txt", ns=(1, 1)), r"1 changed \(texts/1\.txt\) since"),
    "new": (lambda t: (t / "9.txt").write_text("more"), r"1 new \(texts/9\.txt\) since"),
    "removed": (lambda t: (t / "2.txt").unlink(), r"1 removed \(texts/2\.txt\) since"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_changed_sources_are_noticed(tmp_path, texts, case):
    change, words = CHANGES[case]
    folder = tokenize.prepare(settings(tmp_path / "data", texts), options=NEW)
    first = Corpus.open(folder).fingerprint
    change(texts)
    with pytest.raises(UserError, match=words + r"[\s\S]*prepare\.overwrite=true"):
        tokenize.prepare(settings(folder, texts), options=NEW)
    again = Corpus.open(tokenize.prepare(settings(folder, texts), options=AGAIN)).fingerprint
    assert (again == first) == (case == "touched")
    as_before_records(folder)
    change(texts) if case == "touched" else (texts / "0.txt").write_text("other")
    # an earlier version kept no listing
    assert tokenize.prepare(settings(folder, texts), options=NEW) == folder


def test_a_source_that_is_gone_does_not_matter_to_what_is_prepared(tmp_path, texts, capsys):
    folder = tokenize.prepare(settings(tmp_path / "data", texts), options=NEW)
    shutil.rmtree(texts)
    assert tokenize.prepare(settings(folder, texts), options=NEW) == folder
    assert "its source is missing" in capsys.readouterr().err


def test_another_tokenizer_in_the_same_place_is_noticed(tmp_path, texts):
    first = tokenize.prepare(settings(tmp_path / "first", texts), options=NEW)
    data = settings(tmp_path / "data", texts, tokenizer=str(first / "tokenizer"))
    tokenize.prepare(data, options=NEW)
    tokenize.prepare(settings(tmp_path / "first", texts, vocab_size=260), options=AGAIN)
    assert "the tokenizer has changed since" in refused(data, options=NEW)


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how != "gone":
        file.write_bytes(
            {
                "empty": b"",
                "cut": content[: len(content) // 2],
                "bit": bytes([content[0] ^ 1]) + content[1:],
                "junk": b"\xff\xfe junk",
            }[how]
        )


@pytest.mark.parametrize("name", ["train.bin", "eval.idx"])
def test_a_damaged_folder_is_not_called_prepared(tmp_path, texts, name):
    folder = tokenize.prepare(settings(tmp_path / "data", texts), options=NEW)
    whole = (folder / name).read_bytes()
    for how in ("folder", "gone", "empty", "cut", "bit"):
        damage(folder / name, how)
        message = refused(settings(folder, texts), options=NEW)
        assert name in message
        assert "prepare.overwrite=true" in message
        if how == "folder":
            (folder / name).rmdir()
        (folder / name).write_bytes(whole)
    damage(folder / name, "cut")
    tokenize.prepare(settings(folder, texts), options=AGAIN)
    assert (folder / name).read_bytes() == whole


def advised(folder: Path) -> list[str]:
    """The command that a damaged folder is told to be written again with, as a shell takes it."""
    with pytest.raises(UserError) as error:
        Corpus.open(folder)
    return shlex.split(str(error.value).partition("try:     ")[2])


def test_the_advice_for_a_damaged_folder_writes_the_same_corpus(tmp_path, texts):
    """Not Python's library over the user's text."""
    texts = texts.rename(tmp_path / "my 'own' texts, of [2026]")
    folder = tokenize.prepare(
        settings(tmp_path / "my data", texts, append_eos=False, vocab_size=280), options=NEW
    )
    whole = contents(folder)
    for spoil in (
        lambda: damage(folder / "train.bin", "gone"),
        lambda: damage(folder / "train.idx", "cut"),
        lambda: damage(folder / "eval.bin", "bit"),
    ):
        spoil()
        command = advised(folder)
        assert command[:2] == ["hybridtrain", "prepare"]
        assert commands.run_command("prepare", command[2:]) == 0
        assert {name: content for name, content in contents(folder).items() if name != "speed.json"} == {
            name: content for name, content in whole.items() if name != "speed.json"
        }
    (folder / ".partial").mkdir()
    (folder / ".partial" / "plan.json").write_text(
        json.dumps({"settings": json.loads(whole["corpus.json"])["settings"]})
    )
    (folder / "corpus.json").unlink()
    for file in folder.glob("*.idx"):
        file.unlink()
    assert advised(folder) == command[:-1]
    shutil.rmtree(folder / ".partial")
    assert advised(folder)[3:6] == ["data.source=[YOUR", "TEXT],", "with"]


def test_a_folder_that_is_not_there_is_looked_for_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError,
        match=(
            r"data\.path=mine: there is no such folder, "
            rf".*\(looked in {tmp_path}\)[\s\S]*data\.source=\[YOUR TEXT\]$"
        ),
    ):
        Corpus.open("mine")


def test_a_tokenizer_that_has_changed_is_noted(tmp_path, texts, capsys):
    folder = tokenize.prepare(settings(tmp_path / "data", texts), options=NEW)
    damage(folder / "tokenizer" / "tokenizer_config.json", "junk")
    tokenize.prepare(settings(folder, texts), options=NEW)
    assert (
        "is prepared already; tokenizer/tokenizer_config.json has 7 bytes, and prepare wrote"
        in capsys.readouterr().err
    )
    assert any("tokenizer_config.json" in problem for problem in verify_corpus(folder))


@pytest.mark.parametrize("how", ["folder", "empty", "cut", "junk"])
def test_damaged_figures_are_said_to_be_damaged(tmp_path, texts, how):
    folder = tokenize.prepare(settings(tmp_path / "data", texts), options=NEW)
    assert "tokens/s" in statistics.table(folder)
    damage(folder / "speed.json", how)
    table = statistics.table(folder)
    assert "speed      cannot be shown, speed.json is damaged" in table
    assert "vocabulary 270" in table
    facts = json.loads((folder / "corpus.json").read_text())
    (folder / "corpus.json").write_text(json.dumps({**facts, "splits": {"train": None}}))
    assert "corpus.json is damaged" in statistics.table(folder)
