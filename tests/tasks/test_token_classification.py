"""Words with labels: rows, encoders and decoders under every layout against one plain process, the export in
plain transformers, and bad input."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hybridtrain.cli.main import main
from hybridtrain.config import schema
from hybridtrain.config.compose import train_config
from hybridtrain.data.corpus import Corpus
from hybridtrain.data.indexed import IndexedReader
from hybridtrain.data.prepare.tokenize import prepare
from hybridtrain.data.prepare.words import NO_TOKEN
from hybridtrain.data.rows import Block
from hybridtrain.errors import UserError
from hybridtrain.models.build import hf_config
from hybridtrain.models.classifier import ANSWERS, TEXTS, TOKENS
from hybridtrain.models.source import read_config, with_head
from hybridtrain.tasks.token_classification import TextTokenClassification, TokenClassification
from hybridtrain.types import IGNORE_INDEX
from tests import runs
from tests.ranks import run_ranks
from tests.tasks import classified, tagged
from tests.tasks.encoders import LAYOUTS, agree
from tests.tasks.tagged import LABELS, SEQ, VOCAB


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tagged.corpus(tmp_path_factory.mktemp("tagged"), encoder=True)


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tagged.corpus(tmp_path_factory.mktemp("tagged"), encoder=False)


# -- rows ----------------------------------------------------------------------------------------------------


def prepared(folder: Path, *records: dict[str, object], **more: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "words.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in records))
    fields = {"vocab_size": 262, "eval_fraction": 0.0, "seq_len": SEQ, "labels": LABELS, **more}
    data = schema.DataConfig(
        path=str(folder / "data"), source=[str(folder / "words.jsonl")], format="labelled_words"
    )
    for name, value in fields.items():
        setattr(data, name, value)
    return prepare(data, options=schema.PrepareConfig())


@pytest.mark.parametrize("encoder", [True, False])
def test_the_first_token_of_a_word_has_its_label_and_others_have_none(tmp_path: Path, encoder: bool) -> None:
    from transformers import AutoTokenizer

    record = {"text": ["abc", "", "d", "é", "x y"], "label": ["name", 1, "number", 0, 2]}
    folder = prepared(tmp_path, record, encoder_tokens=encoder)
    corpus, tokenizer = Corpus.open(folder), AutoTokenizer.from_pretrained(folder / "tokenizer")
    reader = corpus.readers["train"]
    rows = corpus.rows("train", seq_len=SEQ, documents=True, vocab=VOCAB)
    batch = TokenClassification(labels=3).collate(rows.gather(np.arange(1)), valid=1)
    text = tokenizer("abc  d é x y")["input_ids"]
    assert reader.read(0, len(text)).tolist() == text
    assert batch.input_ids_BT[0, : len(text)].tolist() == text
    spans = tokenizer("abc  d é x y", return_offsets_mapping=True)["offset_mapping"]
    firsts = {0: 2, 5: 1, 7: 0, 9: 2}
    """Beginning of a word in characters -> its label."""
    expected, taken = [], set()
    for start, stop in spans:
        first = next((at for at in firsts if start <= at < stop and at not in taken), None)
        taken.add(first)
        expected.append(IGNORE_INDEX if first is None else firsts[first])
    assert batch.labels_BT[0, : len(text)].tolist() == expected
    assert batch.labels_BT[0, len(text) :].unique().tolist() == [IGNORE_INDEX]
    facts = json.loads((folder / "corpus.json").read_text())
    assert facts["notes"][NO_TOKEN][0] == 1  # the empty word
    assert facts["forms"] == {"name": 2, "number": 2, "other": 1}


def test_an_encoders_row_is_one_text_and_its_padding_is_a_document_of_its_own(encoders: Path) -> None:
    corpus = Corpus.open(encoders)
    alone = Corpus(corpus.path, corpus.readers, corpus.facts, single=True)
    rows = alone.rows("train", seq_len=SEQ, documents=True, vocab=VOCAB)
    block = rows.gather(np.arange(len(rows)))
    batch = TextTokenClassification(labels=3, tokens={"pad": 0}).collate(block, valid=len(rows) - 1)
    for row, (ids, labels, places) in enumerate(
        zip(batch.input_ids_BT, batch.labels_BT, batch.position_ids_BT, strict=True)
    ):
        [number] = rows.documents(row)
        length = int(corpus.readers["train"].sizes[number]) - 1
        assert (ids[length - 1], ids[length:].count_nonzero()) == (3, 0)  # [SEP], [PAD]
        assert places.tolist() == [*range(length), *range(SEQ - length)]
        assert (labels != IGNORE_INDEX).any() == (row < len(rows) - 1)  # the last is not valid
        assert labels[length:].tolist() == [IGNORE_INDEX] * (SEQ - length)


BAD = {
    "another number of labels": ({"text": ["a", "b"], "label": [0]}, "it has 2 words and 1 labels"),
    "no such class": ({"text": ["a"], "label": ["verb"]}, "its field 'label' holds 'verb', which is none of"),
    "out of range": ({"text": ["a"], "label": [3]}, "its field 'label' holds 3, which is none of"),
    "one text": ({"text": "a b", "label": [0, 1]}, "its text is no list of words but 'a b'"),
    "one label": ({"text": ["a", "b"], "label": 0}, "its field 'label' holds no list of labels but 0"),
    "no words": ({"text": [1, 2], "label": [0, 1]}, r"its text is no list of words but \[1, 2\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_records_that_are_no_labelled_words_are_refused(tmp_path: Path, name: str) -> None:
    record, problem = BAD[name]
    with pytest.raises(UserError, match=rf"words.jsonl line 1: {problem}"):
        prepared(tmp_path, record)


def test_more_classes_than_a_mark_can_tell_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"data.labels=\(256 names\): the class of a token is stored in a byte"
    ):
        prepared(tmp_path, {"text": ["a"], "label": [0]}, labels=[str(number) for number in range(256)])


def test_rows_without_labels_of_words_and_labels_without_a_class_are_refused() -> None:
    task, tokens = TokenClassification(labels=2), np.array([[5, 6, 7]])
    carries, marks = np.array([[False, True, False]]), np.array([[0, 3, 0]])
    with pytest.raises(UserError, match=r"model\.labels=2: a row has label 2, the model has 2 classes"):
        task.collate(Block(tokens, None, carries, marks=marks), valid=1)
    for block in (Block(tokens, None, None), Block(tokens, None, carries, marks=np.zeros_like(marks))):
        with pytest.raises(
            UserError, match=r"task\.kind=token_classification: its rows have no labels of words"
        ):
            task.collate(block, valid=1)


# -- training ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(encoders: Path, decoders: Path) -> Callable[[str], classified.Outcome]:
    def of(name: str) -> classified.Outcome:
        encoder = name == "bert"
        words = tagged.words(name, encoders if encoder else decoders)
        return tagged.in_one_process(words, encoder=encoder)

    return functools.cache(of)


CASES = [(name, layout) for name in ("bert", "llama") for layout in LAYOUTS]


@pytest.mark.parametrize(
    ("name", "layout"),
    [pytest.param(*case, marks=() if case == ("bert", "tp2") else pytest.mark.slow) for case in CASES],
)
def test_a_layout_computes_what_one_process_does(
    encoders: Path, decoders: Path, plain: Callable[[str], classified.Outcome], name: str, layout: str
) -> None:
    ranks, folder = (4 if "pp2-tp2" in layout else 2), encoders if name == "bert" else decoders
    argv = tagged.words(name, folder, *LAYOUTS[layout])
    found = run_ranks(ranks, classified.on_rank, argv, ranks)
    agree(found, plain(name))
    if layout in ("zero3", "dp2"):
        assert min(rank.fewest for rank in found) == 0


@pytest.mark.slow
def test_dropout_before_a_decoders_head_is_that_of_one_process(decoders: Path) -> None:
    """Of transformers' classes of decoders it is 0.1 without any field of the config."""
    argv = [word.replace(",classifier_dropout:0.0", "") for word in tagged.words("llama", decoders)]
    found = run_ranks(4, classified.on_rank, [*argv, *LAYOUTS["pp2-tp2"]], 4)
    expected = tagged.in_one_process(argv, encoder=False)
    assert expected.losses[0] != pytest.approx(expected.sums[0][0] / expected.counts[0][0], rel=1e-4)
    expected.sums[:-1] = found[0].sums[:-1]  # those of training are with dropout
    agree(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_parity_is_shown_for_other_families(
    encoders: Path, decoders: Path, tmp_path: Path, name: str
) -> None:
    layouts = ["dp_shard2-zero3", "tp2", "pp2"]
    argv = tagged.words(name, encoders if name == "roberta" else decoders)
    argv = [word for word in argv if not word.startswith(("schedule", "train"))]
    assert main(["parity", *argv, f"parity.layouts=[{','.join(layouts)}]", f"run.dir={tmp_path}"]) == 0
    found = json.loads((tmp_path / "parity.json").read_text())
    assert [row["passed"] for row in found["layouts"]] == [True] * len(layouts)


@pytest.mark.slow
def test_parity_is_shown_for_decoders_under_deepspeed(decoders: Path, tmp_path: Path) -> None:
    layouts = ["tp2", "pp2", "dp_shard2-zero1", "dp_shard2-zero3"]
    argv = [word for word in tagged.words("llama", decoders) if not word.startswith(("schedule", "train"))]
    argv += ["parity.engines=[deepspeed]", f"parity.layouts=[{','.join(layouts)}]", f"run.dir={tmp_path}"]
    assert main(["parity", *argv]) == 0
    found = json.loads((tmp_path / "parity.json").read_text())
    assert [row["passed"] for row in found["layouts"]] == [True] * len(layouts)


# -- runs ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "class_name"), [("bert", "Bert"), ("llama", "Llama")])
def test_a_run_goes_on_bit_for_bit_and_plain_transformers_finds_its_numbers(
    encoders: Path, decoders: Path, tmp_path: Path, name: str, class_name: str
) -> None:
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    folder = encoders if name == "bert" else decoders
    more = ["train.log_every=1", "train.eval_every=2", "train.eval_rows=100", "parallel=single"]

    def trained(run: str, steps: int) -> None:
        argv = tagged.words(name, folder, *more, f"train.steps={steps}", f"run.dir={tmp_path / run}")
        runs.finished(1, argv)

    trained("whole", 4)
    trained("cut", 2)
    trained("cut", 4)
    assert runs.rows(tmp_path / "cut") == runs.rows(tmp_path / "whole")
    assert main(["export", str(tmp_path / "cut")]) == 0
    assert main(["evaluate", str(tmp_path / "cut")]) == 0
    last = json.loads((tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()[-1])
    found = json.loads((tmp_path / "cut" / "evaluation.json").read_text())
    for figure in ("loss", "accuracy"):
        assert found[figure] == pytest.approx(last[f"eval_{figure}"], rel=1e-5)

    export = tmp_path / "cut" / "export"
    model, tokenizer = (
        each.from_pretrained(export) for each in (AutoModelForTokenClassification, AutoTokenizer)
    )
    assert type(model).__name__ == f"{class_name}ForTokenClassification"
    assert model.config.id2label == dict(enumerate(LABELS))
    reader, marks = Corpus.open(folder).readers["eval"], IndexedReader(folder / "eval.loss")
    right, count, loss = 0, 0, 0.0
    for number in range(reader.documents):
        start = int(reader.pointers[number]) // reader.dtype.itemsize
        stop = start + int(reader.sizes[number])
        classes = torch.tensor(marks.read(start + 1, stop).astype(np.int64) - 1)
        ids, labels = torch.tensor(reader.read(start, stop - 1).astype(np.int64)), classes
        labels = labels.masked_fill(labels < 0, IGNORE_INDEX)
        with torch.no_grad():
            out = model.eval()(input_ids=ids[None], labels=labels[None])
        some = int((labels >= 0).sum())
        loss, count = loss + float(out.loss) * some, count + some
        right += int((out.logits[0].argmax(-1) == labels).sum())
    assert tokenizer.decode(ids)
    assert (right / count, count) == (pytest.approx(found["accuracy"]), found["tokens"])
    assert loss / count == pytest.approx(found["loss"], rel=1e-5)


@pytest.mark.slow
def test_words_are_learned_and_another_model_begins_from_what_was_learned(
    decoders: Path, tmp_path: Path, capsys
) -> None:
    argv = [
        *tagged.words("llama", decoders, "train.steps=40", "train.eval_every=40", "train.log_every=40"),
        "parallel=single",
        "optim.lr=0.01",
        f"run.dir={tmp_path / 'run'}",
    ]
    runs.finished(1, [word for word in argv if word != "optim.lr=0.001"])
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval_accuracy"] > 0.9
    assert main(["export", str(tmp_path / "run")]) == 0
    begun = [
        f"model.from_pretrained={tmp_path / 'run' / 'export'}" if word.startswith("++model") else word
        for word in argv
        if not word.startswith(("run.dir", "train.", "optim.lr"))
    ]
    begun += ["train.steps=1", "train.log_every=1"]
    assert main(["train", *begun, f"run.dir={tmp_path / 'again'}"]) == 0
    first = json.loads((tmp_path / "again" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] < 0.5  # the head, too, is the trained one
    capsys.readouterr()
    for task, problem in (
        ("classification", f"data.path={decoders}: its labels are not of whole texts"),
        ("causal_lm", "task.kind=causal_lm: the model is a classifier of 3 classes"),
    ):
        rest = [word for word in begun if not word.startswith("task=")]
        assert main(["train", *rest, f"task={task}", f"run.dir={tmp_path / 'refused'}"]) == 2
        assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    ("has", "asked"), [(TOKENS, TEXTS), (TEXTS, TOKENS), ("ForQuestionAnswering", TOKENS)]
)
def test_weights_with_the_head_of_another_task_are_refused(tmp_path: Path, has: str, asked: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": [f"Bert{has}"]}))
    model = schema.ModelConfig(from_pretrained=str(tmp_path), labels=LABELS)
    if asked == TOKENS:
        model.config = {"architectures": [asked]}
    with pytest.raises(UserError, match="its head is that of another task"):
        read_config(model)


def test_a_published_model_gets_the_head_of_the_task() -> None:
    for task, kind in (("token_classification", TOKENS), ("question_answering", ANSWERS)):
        config = with_head(
            train_config(["model=bert_base", f"task={task}", f"model.labels=[{','.join('ab')}]"])
        )
        assert hf_config(read_config(config.model), chosen={}, attention="sdpa").architectures == [
            f"Bert{kind}"
        ]
    assert with_head(train_config(["model=bert_base"])).model.config["architectures"] == [
        "BertForPreTraining"
    ]


REFUSED = {
    "texts": (["data.path={texts}"], "data.path={texts}: its labels are not of words"),
    "other classes": (["model.labels=[a,b]"], "model.labels=[a,b]: {folder} has the labels other, number"),
    "another head": (
        ["model.config.architectures=[BertForSequenceClassification]"],
        "task.kind=token_classification: the model's head is that of classification",
    ),
    "a model without such a head": (
        ["++model.config={{model_type:mamba,vocab_size:300,hidden_size:32,num_hidden_layers:2}}"],
        "model.config.model_type=mamba: transformers has no such classifier",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused(encoders: Path, tmp_path: Path, capsys, name: str) -> None:
    more, problem = REFUSED[name]
    texts = classified.corpus(tmp_path / "texts", encoder=True) if name == "texts" else ""
    argv = tagged.words("bert", encoders, "parallel=single", f"run.dir={tmp_path / 'run'}")
    assert main(["train", *argv, *(word.format(texts=texts, folder=encoders) for word in more)]) == 2
    assert problem.format(texts=texts, folder=encoders) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
