"""The same texts in every format that `prepare` reads, and what token files of them hold."""

import gzip
import json
import random
from pathlib import Path

import numpy as np

from hybridtrain.config.schema import DataConfig
from hybridtrain.data.indexed import IndexedReader

WORDS = [f"word{number}" for number in range(200)] + [
    "naïve",
    "日本語",
    "=",
    '"',
    "\\",
    "\t",
    "\n",
    "\r\n",
    "\u2028",
]


def make_texts(count: int) -> list[str]:
    generator = random.Random(5)
    return [
        " ".join(generator.choices(WORDS, k=generator.randrange(5, 120))) + f" {number}"
        for number in range(count)
    ]


TEXTS = make_texts(120)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """With blank lines, empty texts, other fields and escapes, which change nothing."""
    lines = [
        json.dumps({"id": number, "text": text, "more": [1, None]}, ensure_ascii=number % 2 == 0)
        for number, text in enumerate(texts)
    ]
    lines[3:3] = ["", '{"text": ""}', "   "]
    path.write_bytes("\n".join(lines).encode())
    return path


def write_zst(path: Path, content: bytes) -> Path:
    import pyarrow

    with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
        file.write(content)
    return path


def write_parquet(path: Path, column: list, *, name: str) -> Path:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": list(range(len(column))), name: pyarrow.array(column)})
    pyarrow.parquet.write_table(table, path, row_group_size=7)
    return path


def as_text_files(folder: Path, *, compressed: bool) -> Path:
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        if compressed:
            (folder / f"{number:04d}.txt.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / f"{number:04d}.txt").write_text(text, newline="")
    return folder


def as_datasets(folder: Path, *, splits: bool) -> Path:
    import datasets

    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    (
        datasets.DatasetDict({"test": dataset.select(range(3)), "train": dataset}) if splits else dataset
    ).save_to_disk(folder)
    return folder


def for_load_dataset(folder: Path) -> Path:
    folder.mkdir()
    write_parquet(folder / "train-00000.parquet", TEXTS, name="text")
    return folder


FORMATS = {
    "text": lambda p: as_text_files(p / "texts", compressed=False),
    "text.gz": lambda p: as_text_files(p / "texts", compressed=True),
    "jsonl": lambda p: write_jsonl(p / "a.jsonl", TEXTS),
    "jsonl.gz": lambda p: (
        p / "a.jsonl.gz",
        (p / "a.jsonl.gz").write_bytes(gzip.compress(write_jsonl(p / "a", TEXTS).read_bytes())),
    )[0],
    "gz by its bytes": lambda p: (
        p / "a.jsonl",
        (p / "a.jsonl").write_bytes(gzip.compress(write_jsonl(p / "a", TEXTS).read_bytes())),
    )[0],
    "not packed": lambda p: write_jsonl(p / "a.jsonl.gz", TEXTS),
    "array": lambda p: (
        p / "a.json",
        (p / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS])),
    )[0],
    "indented": lambda p: (
        p / "a.jsonl",
        (p / "a.jsonl").write_text("\n".join(json.dumps({"text": text}, indent=2) for text in TEXTS)),
    )[0],
    "utf-16": lambda p: (
        p / "a.jsonl",
        (p / "a.jsonl").write_bytes(write_jsonl(p / "a", TEXTS).read_text("utf-8").encode("utf-16")),
    )[0],
    "jsonl.zst": lambda p: write_zst(p / "a.jsonl.zst", write_jsonl(p / "a", TEXTS).read_bytes()),
    "parquet": lambda p: write_parquet(p / "a.parquet", TEXTS, name="text"),
    "saved": lambda p: as_datasets(p / "saved", splits=False),
    "saved with splits": lambda p: as_datasets(p / "saved", splits=True),
    "load_dataset": lambda p: for_load_dataset(p / "folder"),
}


def settings(path: Path, source: Path, reference: Path, **fields: object) -> DataConfig:
    return DataConfig(
        path=str(path),
        source=[str(source)],
        **{"tokenizer": str(reference / "tokenizer"), "eval_fraction": 0.2} | fields,
    )


def tokens(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".bin", ".idx", ".npy")
    }


def decoded(folder: Path, split: str) -> list[str]:
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(folder / "tokenizer")
    reader = IndexedReader(folder / split)
    ends = np.cumsum(reader.sizes)
    return [
        saved.decode(reader.read(end - size, end - 1)) for end, size in zip(ends, reader.sizes, strict=True)
    ]
