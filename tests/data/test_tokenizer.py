"""Tokenizers of other makers: damaged and hostile ones are refused by name, files are
taken for what they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hybridtrain.config.schema import DataConfig, PrepareConfig
from hybridtrain.data.blend import tokenizer_dir
from hybridtrain.data.corpus import Corpus
from hybridtrain.data.prepare import tokenize, tokenizer
from hybridtrain.errors import UserError


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "a.txt"
    file.write_text("a" * 60 + "! some words, and numbers 1 to 12: " * 100)
    return file


@pytest.fixture(scope="module")
def made(tmp_path_factory, texts) -> Path:
    """A tokenizer folder."""
    return (
        tokenize.prepare(
            settings(tmp_path_factory.mktemp("made") / "data", texts, tokenizer="train"),
            options=PrepareConfig(),
        )
        / "tokenizer"
    )


def settings(path: Path, source: Path, **fields: object) -> DataConfig:
    return DataConfig(
        path=str(path), source=[str(source)], **{"vocab_size": 270, "eval_fraction": 0.0} | fields
    )


def changed(**fields: object):
    def write(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(content | fields))

    return write


BAD = {
    "pointer": lambda f: (f / "tokenizer.json").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    ),
    "empty": lambda f: (f / "tokenizer.json").write_text(""),
    "cut": lambda f: (f / "tokenizer.json").write_text((f / "tokenizer.json").read_text()[:500]),
    "a list": lambda f: (f / "tokenizer.json").write_text("[1]"),
    "not UTF-8": lambda f: (f / "tokenizer.json").write_bytes(b"\xff\xfe\x00"),
    "unknown model": changed(model={"type": "Nonsense", "vocab": {}}),
    "vocabulary of text": changed(model={"type": "BPE", "vocab": {"a": "b"}, "merges": []}),
    "merge of nothing": changed(model={"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}),
    "regex": changed(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "((("}, "behavior": "Isolated", "invert": False}
    ),
    "config": lambda f: (f / "tokenizer_config.json").write_text("{"),
    "config of a list": lambda f: (f / "tokenizer_config.json").write_text("[]"),
    "deep": lambda f: (f / "tokenizer.json").write_text("[" * 200_000),
    "backtracking": changed(
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": r"(\w|\w\w)+$"},
            "behavior": "Isolated",
            "invert": False,
        }
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_and_hostile_ones_are_refused_by_name(tmp_path, made, texts, case):
    folder = tmp_path / "tokenizer"
    shutil.copytree(made, folder)
    BAD[case](folder)
    with pytest.raises(UserError) as error:
        tokenize.prepare(settings(tmp_path / "data", texts, tokenizer=str(folder)), options=PrepareConfig())
    assert case == "backtracking" or f"data.tokenizer={folder}" in str(error.value)
    assert case != "pointer" or "git lfs pull" in str(error.value)
    assert case == "backtracking" or not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "other.json"])
def test_a_file_is_taken_for_the_tokenizer_it_is(tmp_path, made, texts, name):
    folder = tmp_path / "tokenizer"
    shutil.copytree(made, folder)
    if name != "tokenizer.json":
        (folder / "tokenizer.json").rename(folder / name)
    data = settings(
        tmp_path / "data", texts, tokenizer=str(folder / name), append_eos=name == "tokenizer.json"
    )
    assert Corpus.open(tokenize.prepare(data, options=PrepareConfig())).vocab_size == 270
    assert tokenizer_dir(settings(tmp_path / "none", texts, tokenizer=data.tokenizer)) == folder


def test_a_part_of_a_tokenizer_is_refused(tmp_path, texts):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    with pytest.raises(UserError, match=r"tokenizer\.model: it is one file of a tokenizer, not all of it"):
        tokenize.prepare(
            settings(tmp_path / "data", texts, tokenizer=str(tmp_path / "tokenizer.model")),
            options=PrepareConfig(),
        )


def test_spaces_are_not_cleaned_up(tmp_path, made):
    folder = tmp_path / "tokenizer"
    shutil.copytree(made, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"clean_up_tokenization_spaces": True}))
    loaded = tokenizer.load(str(folder), field="data.tokenizer")
    loaded.save_pretrained(tmp_path / "saved")
    assert (
        json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["clean_up_tokenization_spaces"]
        is False
    )
