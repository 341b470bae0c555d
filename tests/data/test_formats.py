"""Every format that `prepare` reads: the same texts give the same tokens, whatever the file, the pieces and
the number of processes."""

import dataclasses
import gzip
import itertools
import json
import random
import sys
from pathlib import Path

import pytest

from hybridtrain.config.schema import DataConfig, PrepareConfig
from hybridtrain.data.prepare import join, pieces, readers, statistics, tables, tokenize, tokenizer
from hybridtrain.data.prepare.sources import listing
from hybridtrain.data.prepare.units import Fields
from hybridtrain.errors import UserError
from tests.data.formats import (
    FORMATS,
    TEXTS,
    as_datasets,
    decoded,
    make_texts,
    settings,
    tokens,
    write_jsonl,
    write_parquet,
    write_zst,
)
from tests.data.texts import RECIPE


@pytest.fixture(scope="module", autouse=True)
def small_pieces(tmp_path_factory):
    """A corpus of a few kilobytes in many pieces; the datasets library keeps its cache here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "MIN_PIECE_BYTES", 4000)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("jsonl") / "a.jsonl", TEXTS)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, jsonl) -> Path:
    """Prepared from one JSONL file in one process, with a tokenizer of its own."""
    data = DataConfig(
        path=str(tmp_path_factory.mktemp("reference") / "data"),
        source=[str(jsonl)],
        vocab_size=350,
        eval_fraction=0.2,
    )
    return tokenize.prepare(data, options=PrepareConfig())


def test_documents_and_split_of_records(reference):
    """Every text once, in order; which are held out follows from the content alone."""
    train, held_out = decoded(reference, "train"), decoded(reference, "eval")
    assert sorted(train + held_out) == sorted(TEXTS)
    assert train == [text for text in TEXTS if text in set(train)]
    assert 10 < len(held_out) < 40


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_tokens(tmp_path, reference, kind):
    source = FORMATS[kind](tmp_path)
    fields = {"load_dataset": {"format": "datasets"}, "utf-16": {"encoding": "utf-16"}}.get(kind, {})
    whole = tokenize.prepare(
        settings(tmp_path / "whole", source, reference, eval_fraction=0.0, **fields), options=PrepareConfig()
    )
    assert decoded(whole, "train") == TEXTS
    assert not (whole / "eval.bin").exists()
    if "text" not in kind:
        made = tokenize.prepare(
            settings(tmp_path / "data", source, reference, **fields), options=PrepareConfig()
        )
        assert tokens(made) == tokens(reference)


def test_the_number_of_processes_changes_no_byte(tmp_path, reference, jsonl):
    seen = []
    for count in (1, 3):
        made = tokenize.prepare(
            settings(tmp_path / str(count), jsonl, reference), options=PrepareConfig(workers=count)
        )
        assert tokens(made) == tokens(reference)
        facts, expected = (json.loads((folder / "corpus.json").read_text()) for folder in (made, reference))
        assert {
            name: facts[name] for name in facts if name not in ("settings", "sources", "tokenizer_files")
        } == {
            name: expected[name]
            for name in expected
            if name not in ("settings", "sources", "tokenizer_files")
        }
        seen.append({name: facts[name] for name in facts if name not in ("settings", "sources")})
    assert seen[0] == seen[1]  # of their tokenizer too, which the reference has trained and they were given


@pytest.mark.parametrize("limit", [1, 50, 333, 10**6])
def test_byte_ranges_give_every_line_once(jsonl, limit):
    (source,) = listing(DataConfig(source=[str(jsonl)])).sources
    units = list(readers.units_of(source, fields=Fields.of(DataConfig()), limit=limit))
    assert [unit.start for unit in units[1:]] == [unit.stop for unit in units[:-1]]
    found = [record for unit in units for record in readers.records(unit)]
    assert [record.value for record in found if record.value] == TEXTS
    lines = jsonl.read_bytes().split(b"\n")
    for unit in units[:: max(1, len(units) // 40)]:
        for number, value, *_ in readers.records(unit):
            line = int(readers.where(unit, number).rpartition(" ")[2])
            assert json.loads(lines[line - 1])["text"] == value


def test_a_line_longer_than_a_piece(tmp_path, reference):
    long = " ".join(TEXTS)
    source = write_jsonl(tmp_path / "a.jsonl", [*TEXTS[:5], long, *TEXTS[5:8]])
    made = tokenize.prepare(
        settings(tmp_path / "data", source, reference, eval_fraction=0.0), options=PrepareConfig()
    )
    assert decoded(made, "train") == [*TEXTS[:5], long, *TEXTS[5:8]]


BAD = {
    "no JSON": ("{'text': 'quotes of Python'}", "it is not JSON"),
    "cut": ('{"text": "cut', "it is not JSON"),
    "a list": ('["text"]', "it is no object but a list"),
    "no field": ('{"body": "text"}', r"its field 'text' is missing or null \(its fields: 'body'\)"),
    "null": ('{"text": null}', "its field 'text' is missing or null"),
    "number": ('{"text": 7}', "its field holds no text but 7"),
    "not UTF-8": (b'{"text": "caf\xe9"}', "it is not JSON"),
}


@pytest.mark.parametrize(("case", "count"), [*((case, 0) for case in BAD), ("no JSON", 2)])
def test_a_bad_record_is_refused_with_its_line_or_left_out(tmp_path, jsonl, reference, case, count):
    line, problem = BAD[case]
    lines = jsonl.read_bytes().split(b"\n")
    lines.insert(100, line if isinstance(line, bytes) else line.encode())
    source = tmp_path / "bad.jsonl"
    source.write_bytes(b"\n".join(lines))
    data = settings(tmp_path / "data", source, reference)
    with pytest.raises(
        UserError, match=rf"^data\.source={source} line 101: {problem}[\s\S]*prepare\.skip_bad=true"
    ):
        tokenize.prepare(data, options=PrepareConfig(workers=count))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").glob(".partial/piece-?????")}
    assert count or before
    made = tokenize.prepare(data, options=PrepareConfig(workers=count, skip_bad=True))
    assert tokens(made) == tokens(reference)
    facts = json.loads((made / "corpus.json").read_text())
    assert facts["bad_records"] == 1
    assert facts["first_bad"].startswith(f"{source} line 101: ")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "datasets"])
def test_records_without_text_are_left_out_and_counted(tmp_path, reference, kind):
    texts = ["", *TEXTS[:100], "", *TEXTS[100:], ""]
    source = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_jsonl(source, texts)
    elif kind == "parquet":
        write_parquet(source, texts, name="text")
    else:
        import datasets

        datasets.Dataset.from_dict({"text": texts}).save_to_disk(source)
    made = tokenize.prepare(settings(tmp_path / "data", source, reference), options=PrepareConfig())
    assert tokens(made) == tokens(reference)
    facts = json.loads((made / "corpus.json").read_text())
    # write_jsonl adds one
    first, count = f"{source} {'line 1' if kind == 'jsonl' else 'row 0'}", 4 if kind == "jsonl" else 3
    assert (facts["notes"], facts["bad_records"]) == ({"documents without text, left out": [count, first]}, 0)
    assert f"{count} documents without text, left out, first {first}" in statistics.table(made)


def test_what_the_tokenizer_makes_no_token_of_is_counted(tmp_path, reference):
    from tokenizers import Tokenizer, normalizers
    from transformers import PreTrainedTokenizerFast

    strips = Tokenizer.from_file(str(reference / "tokenizer" / "tokenizer.json"))
    strips.normalizer = normalizers.Strip()
    PreTrainedTokenizerFast(tokenizer_object=strips, eos_token="<|endoftext|>").save_pretrained(
        tmp_path / "strips"
    )
    source = write_jsonl(tmp_path / "a.jsonl", [*TEXTS[:20], " \n"])
    data = settings(
        tmp_path / "data", source, reference, tokenizer=str(tmp_path / "strips"), eval_fraction=0.0
    )
    facts = json.loads((tokenize.prepare(data, options=PrepareConfig()) / "corpus.json").read_text())
    assert facts["notes"] == {
        "documents without text, left out": [1, f"{source} line 5"],
        "documents that the tokenizer encodes to no tokens, left out": [1, f"{source} line 24"],
    }
    assert facts["splits"]["train"]["documents"] == 20


def test_a_bad_beginning_is_refused_before_anything_is_made(tmp_path, reference):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(
        UserError,
        match=r"a\.jsonl line 1: its field 'body' is missing or null \(its fields: 'id', 'text', 'more'\)",
    ):
        tokenize.prepare(
            settings(tmp_path / "data", source, reference, text_key="body"), options=PrepareConfig()
        )
    assert not (tmp_path / "data" / ".partial").exists()


def test_bad_rows_of_parquet_are_named(tmp_path, reference):
    column = [*TEXTS[:50], None, *TEXTS[50:]]
    data = settings(
        tmp_path / "data",
        write_parquet(tmp_path / "a.parquet", column, name="text"),
        reference,
        eval_fraction=0.0,
    )
    with pytest.raises(UserError, match=r"a\.parquet row 50: its field 'text' is empty \(null\)"):
        tokenize.prepare(data, options=PrepareConfig())
    assert decoded(tokenize.prepare(data, options=PrepareConfig(skip_bad=True)), "train") == TEXTS


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path, reference):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "half \\ud83d of one, \\ud83d\\ude00 whole"}\n')
    made = tokenize.prepare(
        settings(tmp_path / "data", source, reference, eval_fraction=0.0), options=PrepareConfig()
    )
    assert decoded(made, "train") == ["half \ufffd of one, \U0001f600 whole"]
    assert json.loads((made / "corpus.json").read_text())["damaged_documents"] == 1


def damaged(path: Path, write: object) -> Path:
    write(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def columns_of_another_name(path: Path) -> Path:
    return write_parquet(path / "a.parquet", TEXTS, name="body")


UNFIT = {
    "cut gz": (
        lambda p: damaged(
            p / "a.jsonl.gz",
            lambda f: f.write_bytes(gzip.compress(json.dumps({"text": "x" * 9999}).encode())),
        ),
        {},
        "cannot be read as jsonl",
    ),
    "cut zst": (
        lambda p: damaged(p / "a.jsonl.zst", lambda f: write_zst(f, random.Random(0).randbytes(99999))),
        {},
        "it is not JSON|cannot be read as jsonl",
    ),
    "cut parquet": (
        lambda p: damaged(p / "a.parquet", lambda f: write_parquet(f, TEXTS, name="text")),
        {},
        "cannot be read as Parquet",
    ),
    "other column": (
        columns_of_another_name,
        {},
        r"data\.text_key=text: .*a\.parquet has no such column\n  allowed: id, body",
    ),
    "numbers": (
        columns_of_another_name,
        {"text_key": "id"},
        r"a\.parquet row 0: its field holds no text but 0",
    ),
    "no split": (
        lambda p: as_datasets(p / "saved", splits=True),
        {"dataset_split": "dev"},
        r"data\.dataset_split=dev: .*no such split\n  allowed: test, train",
    ),
    "hub, offline": (
        lambda _: Path("nobody/nothing"),
        {"format": "datasets"},
        r"data\.source=nobody/nothing: datasets cannot load it",
    ),
    "no such file": (lambda p: p / "none.jsonl", {}, "there is no such file or folder"),
    "no rows": (
        lambda p: write_parquet(p / "a.parquet", TEXTS[:0], name="text"),
        {},
        "no tokens to train on",
    ),
    "no text": (
        lambda p: write_jsonl(p / "a.jsonl", ["", ""]),
        {"deduplicate": True},
        "no tokens to train on",
    ),
    "folder without": (
        lambda p: (p, (p / "a.csv").write_text("x"))[0],
        {},
        r"no text in it \(data\.pattern=\*\.txt .*\*\.parquet",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_unfit_sources_are_refused(tmp_path, reference, case):
    make, fields, message = UNFIT[case]
    data = settings(tmp_path / "data", make(tmp_path), reference, **fields)
    with pytest.raises(UserError, match=message) as error:
        tokenize.prepare(data, options=PrepareConfig())
    assert "try:" in str(error.value)


@pytest.mark.parametrize(
    ("package", "kind"), [("pyarrow", "parquet"), ("datasets", "saved"), ("pyarrow", "jsonl.zst")]
)
def test_a_missing_package_is_named_with_the_command(tmp_path, reference, monkeypatch, package, kind):
    source = FORMATS[kind](tmp_path)
    monkeypatch.setitem(sys.modules, package, None)  # makes its import fail, as when it is not there
    monkeypatch.setattr(tables, "parquet_file", tables.parquet_file.__wrapped__)
    with pytest.raises(
        UserError,
        match=(
            rf"data\.format={package}: the package {package} is not installed[\s\S]*"
            r'pip install "hybridtrain\[data\]"'
        ),
    ):
        tokenize.prepare(settings(tmp_path / "data", source, reference), options=PrepareConfig())


@pytest.mark.parametrize("bucket", [1 << 24, 20])
def test_identical_documents_are_kept_once(tmp_path, reference, monkeypatch, bucket):
    monkeypatch.setattr(join, "BUCKET_DOCUMENTS", bucket)
    generator = random.Random(1)
    texts = [generator.choice(TEXTS[:80]) for _ in range(300)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    made = tokenize.prepare(
        settings(tmp_path / "data", source, reference, deduplicate=True), options=PrepareConfig()
    )
    once = list(dict.fromkeys(texts))
    train, held_out = decoded(made, "train"), decoded(made, "eval")
    assert train == [text for text in once if text in set(train)]
    assert held_out == [text for text in once if text in set(held_out)]
    assert sorted(train + held_out) == sorted(once)
    assert json.loads((made / "corpus.json").read_text())["duplicates"] == 300 - len(once)
    kept = tokenize.prepare(settings(tmp_path / "all", source, reference), options=PrepareConfig())
    assert len(decoded(kept, "train") + decoded(kept, "eval")) == 300
    assert not set(decoded(kept, "train")) & set(decoded(kept, "eval"))


def test_identical_files_stand_on_one_side_only_without_duplicates(tmp_path, reference):
    (tmp_path / "texts").mkdir()
    for number in range(60):
        (tmp_path / "texts" / f"{number:02d}.txt").write_text(f"text {number % 20} of the same words")
    made = tokenize.prepare(
        settings(tmp_path / "data", tmp_path / "texts", reference, deduplicate=True), options=PrepareConfig()
    )
    both = decoded(made, "train") + decoded(made, "eval")
    assert sorted(both) == sorted({f"text {number} of the same words" for number in range(20)})


def test_a_tokenizer_is_trained_on_a_bounded_sample_from_all_over(tmp_path, monkeypatch):
    numbered = [f"{number:05d} {text}" for number, text in enumerate(make_texts(400))]
    source = write_jsonl(tmp_path / "a.jsonl", numbered)
    planned = pieces.plan(listing(DataConfig(source=[str(source)])).sources, fields=Fields.of(DataConfig()))
    recipe = dataclasses.replace(RECIPE, eval_fraction=0.2)
    whole = list(tokenizer.sample(planned, recipe=recipe))
    assert 300 < len(whole) < 340
    assert set(whole) < set(numbered)
    monkeypatch.setattr(tokenizer, "TRAINING_BYTES", 20_000)
    monkeypatch.setattr(tokenizer, "MIN_SAMPLE_BYTES", 100)
    some = list(tokenizer.sample(planned, recipe=recipe))
    assert some == list(tokenizer.sample(planned, recipe=recipe))
    assert 10_000 < sum(len(text.encode()) for text in some) < 25_000
    taken = [int(text[:5]) for text in some if text[:5].isdigit()]
    assert max(b - a for a, b in itertools.pairwise([0, *taken, 400])) < 40
