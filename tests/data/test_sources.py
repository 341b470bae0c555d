"""Which files `prepare` reads, in which encodings, and what it refuses to take for text."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest

from hybridtrain.config.checks import check
from hybridtrain.config.schema import DataConfig, PrepareConfig, PrepareRoot
from hybridtrain.data.prepare import pieces, streams, tokenize
from hybridtrain.data.prepare.documents import Counts, documents
from hybridtrain.data.prepare.sources import listing
from hybridtrain.data.prepare.units import Fields
from hybridtrain.errors import UserError
from tests.data.texts import RECIPE

RUSSIAN = "Съешь же ещё этих мягких французских булок, да выпей чаю. " * 20


def data(path: Path, **fields: object) -> DataConfig:
    return DataConfig(
        path=str(path.parent / "data"),
        source=[str(path)],
        **{"vocab_size": 300, "eval_fraction": 0.0} | fields,
    )


def texts(config: DataConfig) -> list[str]:
    """The documents that `prepare` would encode."""
    planned = pieces.plan(listing(config).sources, fields=Fields.of(config))
    units = [unit for piece in planned for unit in piece.units]
    return [
        document.value for unit in units for document in documents(unit, recipe=RECIPE, counts=Counts.zero())
    ]


def refused(config: DataConfig) -> str:
    with pytest.raises(UserError) as error:
        tokenize.prepare(config, options=PrepareConfig())
    return str(error.value)


@pytest.mark.parametrize("encoding", ["koi8-r", "cp1251", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "json"])
def test_other_encodings_are_refused_until_they_are_named(tmp_path, encoding, kind):
    content = {
        "jsonl": json.dumps({"text": RUSSIAN}, ensure_ascii=False) + "\n",
        "json": json.dumps([{"text": RUSSIAN}], ensure_ascii=False),
    }.get(kind, RUSSIAN)
    file = tmp_path / f"a.{kind}"
    file.write_bytes((gzip.compress if kind.endswith("gz") else bytes)(content.encode(encoding)))
    message = refused(data(file))
    assert str(file) in message
    if encoding == "utf-16":
        assert "try:     data.encoding=utf-16" in message
    elif "txt" in kind:
        assert "are no text in utf-8" in message
        assert "data.encoding=" in message
    assert texts(data(file, encoding=encoding)) == [RUSSIAN]


def test_a_few_bytes_that_are_no_text_are_counted(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"caf\xe9 and much else " + b"words " * 500)
    folder = tokenize.prepare(data(file), options=PrepareConfig())
    assert json.loads((folder / "corpus.json").read_text())["damaged_documents"] == 1


BINARY = {
    "program": (
        b"\x7fELF\x02\x01\x01" + bytes(50) + random.Random(0).randbytes(3000),
        "are no text in utf-8",
    ),
    "xz": (
        b"\xfd7zXZ\x00" + random.Random(0).randbytes(300),
        "it is compressed by xz, not text[\\s\\S]*xz -d",
    ),
    "zip": (b"PK\x03\x04" + random.Random(0).randbytes(300), "it is a zip archive"),
    "pdf": (b"%PDF-1.7\n", "it is a PDF"),
    "tar.gz": (gzip.compress(b"name" + bytes(508) + b"text"), "are no text in utf-8"),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        "git-lfs pointer[\\s\\S]*git lfs pull",
    ),
}


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize("kind", BINARY)
def test_what_is_no_text_is_refused_by_name(tmp_path, kind, ending):
    content, words = BINARY[kind]
    file = tmp_path / f"a.{ending}"
    file.write_bytes(content)
    with pytest.raises(
        UserError, match=words if ending == "txt" or kind == "pointer" else "data.source="
    ) as error:
        tokenize.prepare(data(file), options=PrepareConfig())
    assert str(file) in str(error.value)


NOT_JSON = {
    "trailing comma": (
        '[{"text": "a"},\n {"text": "b"},\n]',
        "line 3: it is not JSON (a comma comes before the end of the array)",
    ),
    "no comma": ('[{"text": "a"}\n {"text": "b"}]', "line 2: it is not JSON (a comma is missing"),
    "cut": ('[{"text": "a"},\n {"text": "b', "line 2: it is not JSON (Unterminated"),
    "not ended": ('[{"text": "a"}\n', "the file ends within the array"),
    "more": ('[{"text": "a"}] {"text": "b"}', "something follows the array"),
    "single quotes": ("[{'text': 'a'}]", "line 1: it is not JSON"),
    "csv": ("id,text\n1,words\n", "line 1: it is not JSON"),
    "deep": ('{"text": ' + "[" * 200_000 + "]" * 200_000 + "}\n", "line 1: it"),
    "deep array": (
        "[" * 200_000 + "]" * 200_000,
        "line 1: it is not JSON (its brackets are nested too deeply)",
    ),
    "comma in a line": ('{"text": "a",}\n', "line 1: it is not JSON"),
    "cr": ('{"text": "a"}\r{"text": "b"}\r', "line 1: it is not JSON"),
}
ADVICE = {
    "csv": "to_parquet",
    "cr": "tr '\\r' '\\n'",
    "comma in a line": "without a comma after the last field",
    "single quotes": "array of objects",
}


@pytest.mark.parametrize("case", NOT_JSON)
def test_what_is_not_json_is_refused_with_its_line_and_advice_that_helps(tmp_path, case):
    content, words = NOT_JSON[case]
    file = tmp_path / "a.json"
    file.write_text(content, newline="")
    message = refused(data(file))
    assert f"{file} " in message
    assert words in message
    assert ADVICE.get(case, "") in message
    assert case == "deep" or "skip_bad" not in message  # it would leave out everything


@pytest.mark.parametrize("block", [2, 7, 100, 1 << 20])
def test_an_array_is_read_in_blocks_of_any_size(tmp_path, block, monkeypatch):
    monkeypatch.setattr(streams, "READ_BYTES", block)
    elements = [
        {"text": 'é\\n"[{', "n": [1.5, -2e10, True, None]},
        {"text": ""},
        "no object",
        12.25,
        {"text": "日本" * 30},
    ]
    for number, content in enumerate(
        (
            json.dumps(elements),
            json.dumps(elements, indent=3, ensure_ascii=False),
            " [ ] ",
            "[1]",
            "\ufeff[12,-3.5e2]\n",
        )
    ):
        file = tmp_path / f"{number}.json"
        file.write_text(content)
        assert list(streams.values(str(file), compression="", encoding="utf-8")) == json.loads(
            content.removeprefix("\ufeff")
        )


def test_a_bad_element_of_an_array_is_named(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('[{"text": "a"}, {"body": "b"}]')
    assert f"{file} element 2: its field 'text' is missing" in refused(data(file))


def test_an_encoding_that_does_not_apply_or_is_none_is_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.parquet")
    assert "data.encoding=latin-1" in refused(data(tmp_path / "a.parquet", encoding="latin-1"))
    for name in ("nonsense", "base64", "a\0b"):
        config = PrepareRoot()
        config.data.path, config.data.source, config.data.encoding = "x", ["stdlib"], name
        with pytest.raises(UserError, match=r"data\.encoding="):
            check(config)


def test_two_columns_of_one_name_are_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert "has 2 columns of this name" in refused(data(tmp_path / "a.parquet"))
