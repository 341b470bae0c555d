"""Long documents: cut where it changes no token, in little memory, whatever they hold."""

from __future__ import annotations

import base64
import json
import random
import subprocess
import sys

import pytest

from hybridtrain.config.schema import DataConfig, PrepareConfig
from hybridtrain.data.prepare import cuts, tokenize
from hybridtrain.errors import UserError

GENERATOR = random.Random(0)
HANZI = [chr(0x4E00 + number) for number in range(300)]
TEXTS = {
    "numbers": " ".join(f"number {i} follows {i * i}, then 0x{i:x};" for i in range(1500)),
    "table": "\n".join(",".join(f"{GENERATOR.random():.6f}" for _ in range(8)) for _ in range(600)),
    "base64": base64.b64encode(GENERATOR.randbytes(20_000)).decode(),
    "log": "\n".join(
        f"2026-11-26T10:{i % 60:02d}:03.{i:06d}Z [INFO] GET /api/v1/x?id={i}&q=%20 200 {i * 3}ms"
        for i in range(500)
    ),
    "chinese": "".join(
        GENERATOR.choice("\u3002\uff0c\u3001") if GENERATOR.random() < 0.08 else GENERATOR.choice(HANZI)
        for _ in range(20_000)
    ),
    "minified": "".join(f"function f{i}(a,b){{return a.x{i}!==b?a:b[{i}];}}" for i in range(800)),
    "spaces": " ".join(
        GENERATOR.choice(["a", "  ", "\n\n", "\t", "x's", "don't", " 12", "\r\n", "e\u0301", "한국어"])
        for _ in range(6000)
    ),
}
# As pre-tokenizers of models have them: contractions, words with a mark before them, numbers of three digits,
# marks with line ends, spaces.
SPLITS = {
    "byte level": None,
    "three digits": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    "one digit": (
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


def made(kind: str):
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=SPLITS[kind] is None)
    if (split := SPLITS[kind]) is not None:
        tokenizer.normalizer = normalizers.NFC()
        level = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), behavior="isolated"), level])
    tokenizer.pre_tokenizer = level
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS.values(), trainer=trainer)
    return tokenizer


@pytest.mark.parametrize("kind", SPLITS)
def test_the_parts_have_the_tokens_of_the_whole(kind, monkeypatch):
    monkeypatch.setattr(cuts, "CHUNK_CHARS", 300)
    tokenizer = made(kind)
    cutter = cuts.Cutter(lambda text: tokenizer.encode(text, add_special_tokens=False).ids)
    assert len(cutter.kinds) == len(cuts._KINDS)
    for name, text in TEXTS.items():
        parts = list(cutter.parts(text))
        assert "".join(parts) == text
        assert max(map(len, parts)) < 2000, name
        assert [
            i for part in parts for i in tokenizer.encode(part, add_special_tokens=False).ids
        ] == tokenizer.encode(text, add_special_tokens=False).ids, name


def test_no_cut_where_each_text_gets_a_prefix():
    """As Llama 2's tokenizer does: a part of a text would get a space that the whole has not."""
    from tokenizers import Tokenizer, models, normalizers

    bpe = Tokenizer(
        models.BPE(vocab={letter: number for number, letter in enumerate("▁abcdefinortux")}, merges=[])
    )
    bpe.normalizer = normalizers.Replace(" ", "▁")
    assert cuts.Cutter(lambda text: bpe.encode(text, add_special_tokens=False).ids).kinds
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    assert not cuts.Cutter(lambda text: bpe.encode(text, add_special_tokens=False).ids).kinds


def test_a_long_stretch_without_a_place_to_cut_is_refused_with_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr(cuts, "CHUNK_CHARS", 100)
    monkeypatch.setattr(cuts, "MOST_CHARS", 5000)
    source = tmp_path / "a.jsonl"
    source.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("some words", "字" * 6000, "more"))
    )
    data = DataConfig(path=str(tmp_path / "data"), source=[str(source)], vocab_size=300, eval_fraction=0.0)
    with pytest.raises(
        UserError, match=r"a\.jsonl line 2: .*6,000 characters without an end of a word for this tokenizer"
    ):
        tokenize.prepare(data, options=PrepareConfig())
    made = tokenize.prepare(data, options=PrepareConfig(skip_bad=True))
    assert json.loads((made / "corpus.json").read_text())["bad_records"] == 1


def test_special_tokens_that_a_document_spells_out_are_counted(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text(
        "".join(
            json.dumps({"text": text}) + "\n"
            for text in ("plain", "it ends with <|endoftext|> here", "more words")
        )
    )
    made = tokenize.prepare(
        DataConfig(path=str(tmp_path / "data"), source=[str(source)], vocab_size=300, eval_fraction=0.0),
        options=PrepareConfig(),
    )
    facts = json.loads((made / "corpus.json").read_text())
    assert facts["documents_with_control_tokens"] == 1
    assert facts["first_with_control_tokens"] == f"{source} line 2"


PROGRAM = """
import resource, sys, torch
from hybridtrain.config.schema import DataConfig, PrepareConfig
from hybridtrain.data.prepare import tokenize
from hybridtrain.training.metrics import max_memory_gib
path, source, tokenizer, fraction, workers = sys.argv[1:]
data = DataConfig(path=path, source=[source], tokenizer=tokenizer, eval_fraction=float(fraction))
tokenize.prepare(data, options=PrepareConfig(workers=int(workers)))
of_children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
of_this = max_memory_gib(torch.device("cpu")) * 1024  # getrusage would count the test's memory before exec
print(int(max(of_this, of_children)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["numbers", "base64", "chinese"])
@pytest.mark.parametrize("fraction", [0.0, 0.02])
def test_a_line_of_40_megabytes_takes_little_memory(tmp_path, kind, fraction):
    source, small = tmp_path / "a.jsonl", tmp_path / "small.txt"
    small.write_text("\n".join(TEXTS.values()))
    first = tokenize.prepare(
        DataConfig(path=str(tmp_path / "first"), source=[str(small)], vocab_size=1000, eval_fraction=0.0),
        options=PrepareConfig(),
    )
    text = TEXTS[kind]
    source.write_text(json.dumps({"text": text * (40_000_000 // len(text.encode()))}, ensure_ascii=False))
    command = [
        sys.executable,
        "-c",
        PROGRAM,
        str(tmp_path / "data"),
        str(source),
        str(first / "tokenizer"),
        str(fraction),
        "0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 800, done.stdout  # MiB; it took 4.5 GiB
