"""The folder that `prepare` writes into: only its own files are replaced, and a refusal leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybridtrain.config.schema import PrepareConfig
from hybridtrain.data.corpus import Corpus
from hybridtrain.data.prepare import tokenize
from tests.data.folders import AGAIN, NEW, as_before_records, contents, few_texts, refused, settings


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return few_texts(tmp_path / "texts")


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
    "name",
    [
        "train.bin",
        "eval.loss.idx",
        "corpus.json",
        "speed.json",
        "tokenizer/tokenizer.json",
        "tokenizer/README.md",
        ".partial/mine",
    ],
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
    assert "tokenizer/README.md, which this command did not write" in refused(
        settings(folder, texts, vocab_size=265), options=AGAIN
    )
    assert contents(folder) == before


def test_a_record_that_was_edited_gives_away_nothing_of_the_users(tmp_path, texts):
    """Preparing again removes what the record lists and the new corpus does not have."""
    folder = tokenize.prepare(settings(tmp_path / "data", texts), options=NEW)
    foreign = [folder / "train.py", tmp_path / "thesis.tex", folder / "notes" / "a.txt"]
    foreign[2].parent.mkdir()
    record = json.loads((folder / ".prepare.json").read_text())
    for path in foreign:
        path.write_text("mine")
    record["files"] += [
        "train.py",
        "../thesis.tex",
        str(tmp_path / "thesis.tex"),
        "tokenizer/../../thesis.tex",
        "notes/a.txt",
        "train.loss.bin",
    ]
    (folder / "train.loss.bin").write_text("of an earlier corpus")
    (folder / ".prepare.json").write_text(json.dumps(record))
    tokenize.prepare(settings(folder, texts, vocab_size=260), options=AGAIN)
    assert [path.read_text() for path in foreign] == ["mine"] * 3
    assert not (folder / "train.loss.bin").exists()


def test_the_source_lies_in_the_folder(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "train.jsonl").write_text(json.dumps({"text": "words " * 100}) + "\n")
    assert "train.jsonl, which is to be read, is in the folder to be written" in refused(
        settings(mine, mine / "train.jsonl"), options=AGAIN
    )
    assert "is in the folder to be written" in refused(settings(mine, mine, pattern="*.jsonl"), options=NEW)
    assert [path.name for path in mine.iterdir()] == ["train.jsonl"]


def test_the_folder_lies_in_the_source(texts):
    """Its own tokenizer's vocabulary is text too, and no source."""
    inside = texts / "made"
    first = Corpus.open(tokenize.prepare(settings(inside, texts, pattern="*"), options=NEW))
    assert sum(split["documents"] for split in first.facts["splits"].values()) == 4
    assert (
        Corpus.open(tokenize.prepare(settings(inside, texts, pattern="*"), options=AGAIN)).fingerprint
        == first.fingerprint
    )


def test_a_tokenizer_is_not_removed_under_itself(tmp_path, texts):
    made = tokenize.prepare(settings(tmp_path / "data", texts), options=NEW)
    again = tokenize.prepare(settings(made, texts, tokenizer=str(made / "tokenizer")), options=AGAIN)
    assert Corpus.open(again).vocab_size == 270
    foreign = tmp_path / "foreign"
    shutil.copytree(made / "tokenizer", foreign / "tokenizer")
    (foreign / "tokenizer" / "README.md").write_text("mine")
    before = contents(foreign)
    assert "tokenizer/README.md" in refused(
        settings(foreign, texts, tokenizer=str(foreign / "tokenizer")), options=NEW
    )
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
    assert sorted(
        path.name for path in tmp_path.rglob("*") if path != texts and texts not in path.parents
    ) == (["a", "b"] if there else [])


def test_a_bad_record_before_anything_is_complete_leaves_nothing(tmp_path, texts):
    made = tokenize.prepare(settings(tmp_path / "made", texts), options=NEW)
    (tmp_path / "records.jsonl").write_text('{"text": "good words"}\n{"text": 5}\n')
    refused(
        settings(tmp_path / "a" / "b", tmp_path / "records.jsonl", tokenizer=str(made / "tokenizer")),
        options=NEW,
    )
    assert not (tmp_path / "a").exists()


def test_places_that_cannot_be_written_are_named(tmp_path, texts):
    for place in ("/proc/none", "/sys/none"):
        assert f"data.path={place}: it cannot be written" in refused(
            settings(Path(place), texts), options=NEW
        )
    (tmp_path / "file").write_text("")
    assert "it is a file" in refused(settings(tmp_path / "file", texts), options=NEW)
    assert "cannot be written" in refused(settings(tmp_path / "file" / "x", texts), options=NEW)


def test_a_prepare_that_was_killed_over_its_first_file_is_begun_again(tmp_path, texts):
    (tmp_path / "data" / ".partial").mkdir(parents=True)
    (tmp_path / "data" / ".partial" / ".plan.json.17-140.partial").write_text("{")
    assert tokenize.prepare(settings(tmp_path / "data", texts), options=NEW) == tmp_path / "data"
    assert not (tmp_path / "data" / ".partial").exists()


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
    assert sorted(facts["sources"]["files"]) == [
        f"root/{place}/{number}.txt" for place in ("a", "b/deep") for number in range(4)
    ]
    assert facts["left_out"] == {"of other endings": 1, "broken links or no regular files": 1, "empty": 1}
    assert (
        "reading 8 sources; left out: 1 broken links or no regular files, 1 empty, 1 of other endings"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("pattern", ["*.txt", "a/*.txt", "**/*.txt", "a/**/*.txt", "[ab]/?.txt", "*"])
def test_patterns_match_as_pathlib_does(tmp_path, texts, pattern):
    root = tmp_path / "root"
    for place in ("", "a", "b", "c/a", "c/a/d", "a/d/e", ".hidden"):
        shutil.copytree(texts, root / place, dirs_exist_ok=True)
    from hybridtrain.data.prepare.sources import listing

    found = listing(settings(tmp_path / "data", root, pattern=pattern)).sources
    expected = sorted(
        f"root/{path.relative_to(root).as_posix()}" for path in root.rglob(pattern) if path.is_file()
    )
    assert [source.name for source in found] == expected


EMBEDDED = """
import sys
from hybridtrain.config.schema import DataConfig
from hybridtrain.data.prepare.embedded import open_or_prepare
data = DataConfig(path=sys.argv[1], source=["stdlib"], vocab_size=300)
print(open_or_prepare(data, timeout_s=300).fingerprint)
"""


@pytest.mark.slow
def test_two_machines_with_a_shared_disk_prepare_once(tmp_path):
    def start(rank: int) -> subprocess.Popen[str]:
        environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": "0"}
        return subprocess.Popen(
            [sys.executable, "-c", EMBEDDED, str(tmp_path / "data")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    both = [start(0), start(8)]
    ended = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    assert ended[0][0] == ended[1][0] != ""
    assert sum("training a tokenizer" in err for _, err in ended) == 1


def test_an_interrupt_is_one_line(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text(
        "".join(
            json.dumps({"text": f"some words and number {number} " * 50}) + "\n" for number in range(20000)
        )
    )
    options = [
        f"data.path={tmp_path / 'data'}",
        f"data.source=[{source}]",
        "data.vocab_size=300",
        "prepare.workers=2",
    ]
    command = [sys.executable, "-m", "hybridtrain.cli", "prepare", *options]
    # tests may run where it is ignored
    heard = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard
    )
    while not list(tmp_path.glob("data/.partial/piece-*")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted; the same command continues from here" in err
    assert "Traceback" not in err


def test_a_source_that_is_misspelt_names_the_nearest(tmp_path, texts):
    assert f"try:     data.source=[{texts / '0.txt'}]" in refused(
        settings(tmp_path / "data", texts / "0.tx"), options=NEW
    )
    assert "try:     data.source=[stdlib]" in refused(settings(tmp_path / "data", Path("stdlb")), options=NEW)
    assert "try:     the path as it is from this folder" in refused(
        settings(tmp_path / "data", texts / "none" / "x"), options=NEW
    )


def test_records_that_all_lack_the_field_are_named(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "some words"}\n' * 8)
    said = refused(
        settings(tmp_path / "data", source, text_key="contents"), options=PrepareConfig(skip_bad=True)
    )
    assert (
        f"8 records were left out (prepare.skip_bad=true), the first {source} line 1: "
        "its field 'contents' is missing or null (its fields: 'text')"
    ) in said
    assert "try:     data.text_key=FIELD" in said
