"""The folder that `prepare` writes into: only its own files are replaced, a refusal leaves nothing, changed sources are noticed."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybridtrain.cli import commands
from hybridtrain.config.schema import DataConfig, PrepareConfig
from hybridtrain.data.corpus import Corpus
from hybridtrain.data.prepare import statistics, tokenize
from hybridtrain.data.verify import verify_corpus
from hybridtrain.errors import UserError

NEW, AGAIN = PrepareConfig(), PrepareConfig(overwrite=True)


@pytest.fixture
def texts(tmp_path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"some words and number {number} " * 50)
    return folder


def settings(path: Path, source: Path, **fields: object) -> DataConfig:
    return DataConfig(path=str(path), source=[str(source)], **{"vocab_size": 270, "eval_fraction": 0.3} | fields)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(data: DataConfig, *, options: PrepareConfig) -> str:
    with pytest.raises(UserError) as error:
        tokenize.prepare(data, options=options)
    return str(error.value)


def as_before_records(folder: Path) -> None:
    """What an earlier version left: no record, and a corpus.json without what was added since."""
    (folder / ".prepare.json").unlink()
    facts = json.loads((folder / "corpus.json").read_text())
    for name in ("sources", "digests", "left_out"):
        facts.pop(name)
    (folder / "corpus.json").write_text(json.dumps(facts))


def test_files_beside_ours_stay(tmp_path, texts):
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("train.py", "eval.py", "train.notes", "eval.txt", "train.bin.bak"):
        (mine / name).write_text(name)
    before = contents(mine)
    for options in (NEW, AGAIN):
        tokenize.prepare(settings(mine, texts), options=options)
        assert {name: content for name, content in contents(mine).items() if name in before} == before


@pytest.mark.parametrize(
    "name", ["train.bin", "eval.loss.idx", "corpus.json", "speed.json", "tokenizer/tokenizer.json", "tokenizer/README.md", ".partial/mine"]
)
@pytest.mark.parametrize("options", [NEW, AGAIN])
def test_a_folder_with_other_files_of_our_names_is_refused(tmp_path, texts, name, options):
    mine = tmp_path / "mine"
    (mine / name).parent.mkdir(parents=True)
    (mine / name).write_text('{"a": 1}')
    message = refused(settings(mine, texts), options=options)
    assert str(mine) in message
    assert name.partition("/")[0] in message
    assert contents(mine) == {name: b'{"a": 1}'}


@pytest.mark.parametrize("earlier", [False, True])
def test_what_was_added_to_our_tokenizer_is_not_removed(tmp_path, texts, earlier):
    folder = tokenize.prepare(settings(tmp_path / "data", texts), options=NEW)
    if earlier:
        as_before_records(folder)
    again = tokenize.prepare(settings(folder, texts, vocab_size=260), options=AGAIN)
    assert Corpus.open(again).vocab_size == 260
    if earlier:
        as_before_records(folder)
    (folder / "tokenizer" / "README.md").write_text("mine")
    before = contents(folder)
    assert "tokenizer/README.md, which this command did not write" in refused(settings(folder, texts, vocab_size=265), options=AGAIN)
    assert contents(folder) == before


def test_a_record_that_was_edited_gives_away_nothing_of_the_users(tmp_path, texts):
    """Preparing again removes what the record lists and the new corpus does not have."""
    folder = tokenize.prepare(settings(tmp_path / "data", texts), options=NEW)
    foreign = [folder / "train.py", tmp_path / "thesis.tex", folder / "notes" / "a.txt"]
    foreign[2].parent.mkdir()
    record = json.loads((folder / ".prepare.json").read_text())
    for path in foreign:
        path.write_text("mine")
    record["files"] += ["train.py", "../thesis.tex", str(tmp_path / "thesis.tex"), "tokenizer/../../thesis.tex", "notes/a.txt", "train.loss.bin"]
    (folder / "train.loss.bin").write_text("of an earlier corpus")
    (folder / ".prepare.json").write_text(json.dumps(record))
    tokenize.prepare(settings(folder, texts, vocab_size=260), options=AGAIN)
    assert [path.read_text() for path in foreign] == ["mine"] * 3
    assert not (folder / "train.loss.bin").exists()


def test_the_source_lies_in_the_folder(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "train.jsonl").write_text(json.dumps({"text": "words " * 100}) + "\n")
    assert "train.jsonl, which is to be read, lies in the folder to be written" in refused(settings(mine, mine / "train.jsonl"), options=AGAIN)
    assert "lies in the folder to be written" in refused(settings(mine, mine, pattern="*.jsonl"), options=NEW)
    assert [path.name for path in mine.iterdir()] == ["train.jsonl"]


def test_the_folder_lies_in_the_source(texts):
    """Its own tokenizer's vocabulary is text too, and no source."""
    inside = texts / "made"
    first = Corpus.open(tokenize.prepare(settings(inside, texts, pattern="*"), options=NEW))
    assert sum(split["documents"] for split in first.facts["splits"].values()) == 4
    assert Corpus.open(tokenize.prepare(settings(inside, texts, pattern="*"), options=AGAIN)).fingerprint == first.fingerprint


def test_a_tokenizer_is_not_removed_under_itself(tmp_path, texts):
    made = tokenize.prepare(settings(tmp_path / "data", texts), options=NEW)
    again = tokenize.prepare(settings(made, texts, tokenizer=str(made / "tokenizer")), options=AGAIN)
    assert Corpus.open(again).vocab_size == 270
    foreign = tmp_path / "foreign"
    shutil.copytree(made / "tokenizer", foreign / "tokenizer")
    (foreign / "tokenizer" / "README.md").write_text("mine")
    before = contents(foreign)
    assert "tokenizer/README.md" in refused(settings(foreign, texts, tokenizer=str(foreign / "tokenizer")), options=NEW)
    assert contents(foreign) == before


REFUSED = {
    "no such source": {"source": ["/nowhere"]},
    "no such tokenizer": {"tokenizer": "/nowhere/tokenizer"},
    "no text": {"pattern": "*.nothing"},
    "no template": {"format": "chat", "tokenizer": "train"},
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("there", [False, True])
def test_a_refusal_leaves_nothing(tmp_path, texts, case, there):
    folder = tmp_path / "a" / "b"
    if there:
        folder.mkdir(parents=True)
    data = settings(folder, texts)
    for name, value in REFUSED[case].items():
        setattr(data, name, value)
    refused(data, options=NEW)
    assert sorted(path.name for path in tmp_path.rglob("*") if path != texts and texts not in path.parents) == (["a", "b"] if there else [])


def test_a_bad_record_before_anything_is_complete_leaves_nothing(tmp_path, texts):
    made = tokenize.prepare(settings(tmp_path / "made", texts), options=NEW)
    (tmp_path / "records.jsonl").write_text('{"text": "good words"}\n{"text": 5}\n')
    refused(settings(tmp_path / "a" / "b", tmp_path / "records.jsonl", tokenizer=str(made / "tokenizer")), options=NEW)
    assert not (tmp_path / "a").exists()


def test_places_that_cannot_be_written_are_named(tmp_path, texts):
    for place in ("/proc/none", "/sys/none"):
        assert f"data.path={place}: it cannot be written" in refused(settings(Path(place), texts), options=NEW)
    (tmp_path / "file").write_text("")
    assert "it is a file" in refused(settings(tmp_path / "file", texts), options=NEW)
    assert "cannot be written" in refused(settings(tmp_path / "file" / "x", texts), options=NEW)


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
    "gone": (lambda t: (t / "2.txt").unlink(), r"1 gone \(texts/2\.txt\) since"),
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
    assert tokenize.prepare(settings(folder, texts), options=NEW) == folder  # an earlier version kept no listing


def test_a_prepare_that_was_killed_over_its_first_file_is_begun_again(tmp_path, texts):
    (tmp_path / "data" / ".partial").mkdir(parents=True)
    (tmp_path / "data" / ".partial" / ".plan.json.17-140.partial").write_text("{")
    assert tokenize.prepare(settings(tmp_path / "data", texts), options=NEW) == tmp_path / "data"
    assert not (tmp_path / "data" / ".partial").exists()


def test_a_source_that_is_gone_does_not_matter_to_what_is_prepared(tmp_path, texts, capsys):
    folder = tokenize.prepare(settings(tmp_path / "data", texts), options=NEW)
    shutil.rmtree(texts)
    assert tokenize.prepare(settings(folder, texts), options=NEW) == folder
    assert "its source is not there any more" in capsys.readouterr().err


def test_another_tokenizer_in_the_same_place_is_noticed(tmp_path, texts):
    first = tokenize.prepare(settings(tmp_path / "first", texts), options=NEW)
    data = settings(tmp_path / "data", texts, tokenizer=str(first / "tokenizer"))
    tokenize.prepare(data, options=NEW)
    tokenize.prepare(settings(tmp_path / "first", texts, vocab_size=260), options=AGAIN)
    assert "the tokenizer has changed since" in refused(data, options=NEW)


def test_links_to_folders_are_followed_and_what_is_left_out_is_said(tmp_path, texts, capsys):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    shutil.copytree(texts, root / "a")
    shutil.copytree(texts, elsewhere / "deep")
    (root / "b").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(root)
    (root / "again").symlink_to(root / "a")
    (root / "none.txt").symlink_to("/nowhere/at/all")
    (root / "note.md").write_text("no document")
    (root / "empty.txt").write_text("")
    folder = tokenize.prepare(settings(tmp_path / "data", root), options=NEW)
    facts = json.loads((folder / "corpus.json").read_text())
    assert sum(split["documents"] for split in facts["splits"].values()) == 8
    assert sorted(facts["sources"]["files"]) == [f"root/{place}/{number}.txt" for place in ("a", "b/deep") for number in range(4)]
    assert facts["left_out"] == {"of other endings": 1, "links to nothing, or no files": 1, "empty": 1}
    assert "reading 8 sources; left out: 1 empty, 1 links to nothing, or no files, 1 of other endings" in capsys.readouterr().err


@pytest.mark.parametrize("pattern", ["*.txt", "a/*.txt", "**/*.txt", "a/**/*.txt", "[ab]/?.txt", "*"])
def test_patterns_match_as_pathlib_does(tmp_path, texts, pattern):
    root = tmp_path / "root"
    for place in ("", "a", "b", "c/a", "c/a/d", "a/d/e", ".hidden"):
        shutil.copytree(texts, root / place, dirs_exist_ok=True)
    from hybridtrain.data.prepare.sources import listing

    found = listing(settings(tmp_path / "data", root, pattern=pattern)).sources
    expected = sorted(f"root/{path.relative_to(root).as_posix()}" for path in root.rglob(pattern) if path.is_file())
    assert [source.name for source in found] == expected


EMBEDDED = """
import sys
from hybridtrain.config.schema import DataConfig
from hybridtrain.data.prepare.embedded import open_or_prepare
print(open_or_prepare(DataConfig(path=sys.argv[1], source=["stdlib"], vocab_size=300), timeout_s=300).fingerprint)
"""


@pytest.mark.slow
def test_two_machines_with_a_shared_disk_prepare_once(tmp_path):
    def start(rank: int) -> subprocess.Popen[str]:
        environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": "0"}
        return subprocess.Popen(
            [sys.executable, "-c", EMBEDDED, str(tmp_path / "data")], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    both = [start(0), start(8)]
    ended = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    assert ended[0][0] == ended[1][0] != ""
    assert sum("training a tokenizer" in err for _, err in ended) == 1


def test_an_interrupt_is_one_line(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": f"some words and number {number} " * 50}) + "\n" for number in range(20000)))
    options = [f"data.path={tmp_path / 'data'}", f"data.source=[{source}]", "data.vocab_size=300", "prepare.workers=2"]
    command = [sys.executable, "-m", "hybridtrain.cli", "prepare", *options]
    heard = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731 - tests may run where it is ignored
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    while not list(tmp_path.glob("data/.partial/piece-*")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted; the same command goes on from here" in err
    assert "Traceback" not in err


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how != "gone":
        file.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "bit": bytes([content[0] ^ 1]) + content[1:], "junk": b"\xff\xfe junk"}[how])


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
    folder = tokenize.prepare(settings(tmp_path / "my data", texts, append_eos=False, vocab_size=280), options=NEW)
    whole = contents(folder)
    for spoil in (lambda: damage(folder / "train.bin", "gone"), lambda: damage(folder / "train.idx", "cut"), lambda: damage(folder / "eval.bin", "bit")):
        spoil()
        command = advised(folder)
        assert command[:2] == ["hybridtrain", "prepare"]
        assert commands.run_command("prepare", command[2:]) == 0
        assert {name: content for name, content in contents(folder).items() if name != "speed.json"} == {
            name: content for name, content in whole.items() if name != "speed.json"
        }
    (folder / ".partial").mkdir()
    (folder / ".partial" / "plan.json").write_text(json.dumps({"settings": json.loads(whole["corpus.json"])["settings"]}))
    (folder / "corpus.json").unlink()
    for file in folder.glob("*.idx"):
        file.unlink()
    assert advised(folder) == command[:-1]
    shutil.rmtree(folder / ".partial")
    assert advised(folder)[3:6] == ["data.source=[YOUR", "TEXT],", "with"]


def test_a_folder_that_is_not_there_is_looked_for_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"data\.path=mine: there is no such folder, .*\(looked in {tmp_path}\)[\s\S]*data\.source=\[YOUR TEXT\]$"):
        Corpus.open("mine")


def test_a_source_that_is_misspelt_names_the_nearest(tmp_path, texts):
    assert f"try:     data.source=[{texts / '0.txt'}]" in refused(settings(tmp_path / "data", texts / "0.tx"), options=NEW)
    assert "try:     data.source=[stdlib]" in refused(settings(tmp_path / "data", Path("stdlb")), options=NEW)
    assert "try:     the path as it is from this folder" in refused(settings(tmp_path / "data", texts / "none" / "x"), options=NEW)


def test_records_that_all_lack_the_field_are_named(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "some words"}\n' * 8)
    said = refused(settings(tmp_path / "data", source, text_key="contents"), options=PrepareConfig(skip_bad=True))
    assert f"8 records were left out (prepare.skip_bad=true), the first {source} line 1: its field 'contents' is missing or null (its fields: 'text')" in said
    assert "try:     data.text_key=FIELD" in said


def test_a_tokenizer_that_has_changed_is_noted(tmp_path, texts, capsys):
    folder = tokenize.prepare(settings(tmp_path / "data", texts), options=NEW)
    damage(folder / "tokenizer" / "tokenizer_config.json", "junk")
    tokenize.prepare(settings(folder, texts), options=NEW)
    assert "is prepared already; tokenizer/tokenizer_config.json has 7 bytes, and prepare wrote" in capsys.readouterr().err
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
