"""An export has the tokenizer of what its checkpoint was trained on, wherever the data lie and
whatever they have become."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from hybridtrain.checkpoint import marker
from hybridtrain.cli.main import main
from hybridtrain.config import schema
from hybridtrain.data.prepare.tokenize import prepare
from tests.ranks import run_ranks
from tests.runs import Ended, arguments, finished, four_parts, on_this_rank


def corpus(folder: Path, *, words: str) -> bytes:
    """Prepare text of these words into `folder`, over what is there; its tokenizer.json."""
    text = folder.with_name(f"text of {words}")
    text.mkdir(parents=True, exist_ok=True)
    for number in range(12):
        (text / f"{number}.txt").write_text(
            " ".join(f"number {number * n} {words} {n * n},\n" for n in range(60))
        )
    config = schema.DataConfig(path=str(folder), source=[str(text)], vocab_size=300, eval_fraction=0.2)
    prepare(config, options=schema.PrepareConfig(overwrite=True))
    return (folder / "tokenizer" / "tokenizer.json").read_bytes()


def trained(folder: Path, argv: list[str]) -> Ended:
    os.chdir(folder)
    return on_this_rank(argv)


class Begun:
    """A run and its data, begun in a folder that both paths are relative to."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        place.mkdir()
        monkeypatch.chdir(place)
        self.place, self.run, self.data = place, place / "runs" / "a", place / "data" / "mine"
        self.tokenizer = corpus(self.data, words="follows")
        self.train("data/mine", train__steps=2)

    def train(self, data: str, **options: object) -> None:
        argv = arguments(Path("runs/a"), Path(data), checkpoint__every=1, checkpoint__keep_last=0, **options)
        [ended] = run_ranks(1, trained, self.place, argv)
        assert ended.code == 0, ended.err

    def exported(self) -> bytes:
        assert main(["export", str(self.run)]) == 0
        return (self.run / "export" / "tokenizer.json").read_bytes()


def as_earlier(run: Path) -> None:
    """Make a run what earlier releases wrote: without a tokenizer of its own."""
    shutil.rmtree(run / "model" / "tokenizer")
    for checkpoint in (run / "checkpoints").iterdir():
        shutil.rmtree(checkpoint / "tokenizer")
        listed = json.loads((checkpoint / "complete.json").read_text())
        listed["files"] = {
            name: record for name, record in listed["files"].items() if not name.startswith("tokenizer/")
        }
        (checkpoint / "complete.json").write_text(json.dumps(listed))


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Begun:
    return Begun(tmp_path / "begun", monkeypatch)


def test_an_export_has_the_tokenizer_that_the_run_kept(
    begun: Begun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = begun.run / "checkpoints" / "step-00000002"
    assert {"tokenizer/data.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"} <= set(
        marker.read(newest)
    )
    assert begun.exported() == begun.tokenizer
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert begun.exported() == begun.tokenizer
    assert corpus(tmp_path / "elsewhere" / "data" / "mine", words="goes before") != begun.tokenizer
    assert begun.exported() == begun.tokenizer
    monkeypatch.chdir(begun.place)
    assert corpus(begun.data, words="comes after") != begun.tokenizer
    assert begun.exported() == begun.tokenizer
    shutil.rmtree(begun.data)
    assert begun.exported() == begun.tokenizer
    assert main(["verify", str(begun.run)]) == 0
    assert "warning" not in capsys.readouterr().out
    (newest / "tokenizer" / "tokenizer.json").write_bytes(begun.tokenizer[:-1])
    assert main(["export", str(begun.run)]) == 2
    assert main(["verify", str(begun.run)]) == 1


def test_the_tokenizer_of_an_earlier_releases_run_is_that_of_its_data_or_none(
    begun: Begun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_earlier(begun.run)
    assert begun.exported() == begun.tokenizer
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(begun.run / "export")
    assert begun.exported() == begun.tokenizer, "the data lie where the run was begun"
    corpus(tmp_path / "data" / "mine", words="goes before")
    assert begun.exported() == begun.tokenizer, "not those that have the same path from here"
    was, _ = (json.loads((begun.data / "corpus.json").read_text())["fingerprint"], capsys.readouterr())
    corpus(begun.data, words="comes after")
    monkeypatch.chdir(begun.place)
    now = json.loads((begun.data / "corpus.json").read_text())["fingerprint"]
    assert main(["export", str(begun.run)]) == 2
    said = four_parts(capsys.readouterr().err, "data.path")
    assert was in said
    assert now in said
    shutil.rmtree(begun.data)
    assert main(["export", str(begun.run)]) == 2
    assert "the earlier export there has a tokenizer, and this one would have none" in four_parts(
        capsys.readouterr().err, "export.out"
    )
    assert (begun.run / "export" / "tokenizer.json").read_bytes() == begun.tokenizer
    assert main(["export", str(begun.run), f"export.out={tmp_path / 'new'}"]) == 0
    assert (
        "no tokenizer is exported, there is none with the data (looked in data/mine)"
        in capsys.readouterr().out
    )
    assert not (tmp_path / "new" / "tokenizer.json").exists()


def test_each_checkpoint_has_the_tokenizer_of_the_data_it_came_to(begun: Begun) -> None:
    other = begun.place / "other"
    tokenizer = corpus(other, words="goes before")
    begun.train("other", train__steps=3, run__allow_data_change=True)
    assert begun.exported() == tokenizer
    assert main(["export", f"export.checkpoint={begun.run}/checkpoints/step-00000002"]) == 0
    assert (begun.run / "export" / "tokenizer.json").read_bytes() == begun.tokenizer


def test_a_tokenizer_that_was_damaged_before_the_run_began_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole, file = (
        corpus(tmp_path / "data", words="follows"),
        tmp_path / "data" / "tokenizer" / "tokenizer.json",
    )
    file.write_bytes(whole[:-1])
    said = finished(1, arguments(tmp_path / "run", tmp_path / "data", train__steps=1))
    assert "the tokenizer is not copied into the run, an export will look for it again" in said.out
    file.write_bytes(whole)
    assert main(["export", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "export" / "tokenizer.json").read_bytes() == whole
