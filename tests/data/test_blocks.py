"""Long documents: blocks of them are held out, the same ones as the corpus grows, and the
share is what was asked."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from hybridtrain.config.schema import DataConfig, PrepareConfig
from hybridtrain.data.indexed import IndexedReader
from hybridtrain.data.prepare import blocks, pieces, tokenize
from hybridtrain.data.prepare.sources import listing
from hybridtrain.errors import UserError

WORDS = [f"word{number}" for number in range(300)]


def text(chars: int, *, seed: int) -> str:
    generator = random.Random(seed)
    lines = []
    while 100 * len(lines) < chars:
        lines.append(
            " ".join(generator.choices(WORDS, k=12))[:80].ljust(80) + f" {generator.random():.16f}\n"
        )
    return "".join(lines)[:chars]


def settings(path: Path, *source: Path, **fields: object) -> DataConfig:
    return DataConfig(
        path=str(path),
        source=[str(entry) for entry in source],
        **{"vocab_size": 400, "eval_fraction": 0.02} | fields,
    )


def documents(folder: Path, split: str) -> list[str]:
    from transformers import AutoTokenizer

    if not (folder / f"{split}.bin").exists():
        return []
    saved, reader = AutoTokenizer.from_pretrained(folder / "tokenizer"), IndexedReader(folder / split)
    ends = np.cumsum(reader.sizes)
    return [
        saved.decode(reader.read(end - size, end - 1)) for end, size in zip(ends, reader.sizes, strict=True)
    ]


def share(folder: Path) -> float:
    splits = json.loads((folder / "corpus.json").read_text())["splits"]
    return splits["eval"]["tokens"] / (splits["eval"]["tokens"] + splits["train"]["tokens"])


@pytest.mark.parametrize("fraction", [0.0005, 0.02, 0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("how", [blocks.BY_CHANCE, blocks.SURELY])
def test_the_parts_are_the_text_and_the_share_is_what_was_asked(fraction, how):
    whole = text(4_000_000, seed=1)
    parts = list(blocks.cut(whole, key="name", fraction=fraction, how=how))
    assert "".join(part for part, _ in parts) == whole
    held_out = [part for part, held in parts if held]
    if fraction >= 0.02:
        assert sum(map(len, held_out)) / len(whole) == pytest.approx(fraction, rel=0.2)
        assert max(map(len, held_out)) <= (1 << 14) + 256
    assert all(part[0] != " " or len(part) < 300 for part in held_out)


@pytest.mark.parametrize("how", [blocks.BY_CHANCE, blocks.SURELY])
def test_what_is_appended_moves_no_block(how):
    whole = text(3_000_000, seed=2)
    last: list[str] = []
    for chars in (20_000, 100_000, 150_000, 1_000_000, len(whole)):
        found = [part for part, held in blocks.cut(whole[:chars], key="name", fraction=0.05, how=how) if held]
        assert all(
            part == before or part.startswith(before) for part, before in zip(found, last, strict=False)
        )
        assert len(found) >= len(last)
        last = found


@pytest.mark.parametrize("kind", ["text", "jsonl"])
@pytest.mark.parametrize(("chars", "fraction"), [(36_000, 0.02), (200_000, 0.02), (200_000, 0.1)])
def test_one_file_has_held_out_rows(tmp_path, kind, chars, fraction):
    whole = text(chars, seed=3)
    file = tmp_path / ("a.jsonl" if kind == "jsonl" else "a.txt")
    file.write_text(json.dumps({"text": whole}) if kind == "jsonl" else whole)
    folder = tokenize.prepare(
        settings(tmp_path / "data", file, eval_fraction=fraction), options=PrepareConfig()
    )
    assert 0.3 * fraction < share(folder) <= 3 * fraction
    held_out = documents(folder, "eval")
    assert sum(len(part) for part in [*held_out, *documents(folder, "train")]) == len(whole)
    assert all(part in whole for part in held_out)


def test_what_is_held_out_stays_so_as_the_corpus_grows(tmp_path):
    """A book that was much of its corpus is less than 1/50 of it in the end."""
    root = tmp_path / "texts"
    root.mkdir()
    (root / "book.txt").write_text(text(20_000, seed=4))
    first = tokenize.prepare(settings(tmp_path / "first", root, eval_fraction=0.0), options=PrepareConfig())
    folder, before = tmp_path / "data", []
    for number, add in enumerate((0, 1, 70)):
        for other in range(add):
            (root / f"{number}-{other}.txt").write_text(text(17_000, seed=100 * number + other))
        (root / "book.txt").write_text(
            (root / "book.txt").read_text() + f"\nchapter {number} " + text(3000, seed=number)
        )
        data = settings(folder, root, eval_fraction=0.05, tokenizer=str(first / "tokenizer"))
        tokenize.prepare(data, options=PrepareConfig(overwrite=True))
        held_out, train = documents(folder, "eval"), "\n".join(documents(folder, "train"))
        assert all(any(part.startswith(old) for part in held_out) for old in before)
        assert not any(part[:1500] in train for part in held_out)
        before = held_out
    assert json.loads((folder / "corpus.json").read_text())["held_out"]["texts/book.txt"] in (
        blocks.BY_CHANCE,
        blocks.SURELY,
    )


@pytest.mark.parametrize("deduplicate", [False, True])
def test_processes_and_pieces_change_no_byte(tmp_path, monkeypatch, deduplicate):
    source = tmp_path / "a.jsonl"
    texts = [
        text(60_000, seed=5),
        *(text(500, seed=1000 + number) for number in range(60)),
        text(90_000, seed=6),
        text(60_000, seed=5),
    ]
    source.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    made = []
    for number, size in ((0, 1 << 20), (0, 4000), (2, 30_000)):
        monkeypatch.setattr(pieces, "MIN_PIECE_BYTES", size)
        data = settings(
            tmp_path / f"{size}",
            source,
            deduplicate=deduplicate,
            tokenizer=str(made[0] / "tokenizer") if made else "train",
        )
        made.append(tokenize.prepare(data, options=PrepareConfig(workers=number)))
    facts = [json.loads((folder / "corpus.json").read_text()) for folder in made]
    assert facts[0]["fingerprint"] == facts[1]["fingerprint"] == facts[2]["fingerprint"]
    assert facts[0]["held_out"] == facts[1]["held_out"] == facts[2]["held_out"]
    assert len(facts[0]["held_out"]) == 2
    twice = [part for part in documents(made[0], "train") if part in texts[0]]
    assert len(twice) == len(set(twice)) * (1 if deduplicate else 2)
    assert (facts[0]["duplicates"] > 0) == deduplicate


def test_short_documents_stay_whole(tmp_path):
    """As earlier versions had them: by name, or by content, and one at least."""
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(text(7000, seed=number))
    assert not any(source.blocks for source in listing(settings(tmp_path / "data", tmp_path)).sources)
    (tmp_path / "long.txt").write_text(text(9000, seed=99))
    assert [
        source.name for source in listing(settings(tmp_path / "data", tmp_path)).sources if source.blocks
    ] == [f"{tmp_path.name}/long.txt"]


def test_a_share_far_from_what_was_asked_is_refused_with_advice(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(text(3000, seed=number))
    data = settings(tmp_path / "data", tmp_path)
    with pytest.raises(
        UserError,
        match=(
            r"data\.eval_fraction=0\.02: 3\d\.\d% of the corpus "
            r"would be held out[\s\S]*data\.eval_fraction=0\.3[34]"
        ),
    ) as error:
        tokenize.prepare(data, options=PrepareConfig())
    assert not (tmp_path / "data").exists(), error
    data.eval_fraction = 0.34
    assert share(tokenize.prepare(data, options=PrepareConfig())) == pytest.approx(1 / 3, abs=0.05)


def test_the_share_is_printed(tmp_path, capsys):
    from hybridtrain.config.schema import PrepareRoot

    (tmp_path / "a.txt").write_text(text(100_000, seed=7))
    config = PrepareRoot()
    config.data = settings(tmp_path / "data", tmp_path / "a.txt", eval_fraction=0.1)
    assert tokenize.run(config) == 0
    assert (
        f"held out   {share(tmp_path / 'data'):.1%} of the tokens, 10.0% were asked for"
        in capsys.readouterr().out
    )
