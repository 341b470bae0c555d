"""Answers in contexts: rows, every layout against one plain process, the export in plain transformers, and
bad input."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hybridtrain.cli.main import main
from hybridtrain.config import schema
from hybridtrain.data.corpus import Corpus
from hybridtrain.data.prepare.answers import NO_ROOM, NO_TOKEN, WINDOWS
from hybridtrain.data.prepare.tokenize import prepare
from hybridtrain.data.rows import Block
from hybridtrain.errors import UserError
from hybridtrain.tasks.question_answering import QuestionAnswering
from hybridtrain.types import IGNORE_INDEX, AnswerBatch
from tests import runs
from tests.ranks import run_ranks
from tests.tasks import answered, classified, tagged
from tests.tasks.answered import SEQ, VOCAB
from tests.tasks.encoders import LAYOUTS, agree

GOOD = {"question": "Who?", "context": "It is Ada.", "answer": "Ada", "answer_start": 6}

NO_GRADIENT = ("qa_outputs.bias", "bert.encoder.layer.2.output.LayerNorm.bias")
"""What adds the same to the logits of all positions changes no probability: its gradient is rounding."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return answered.corpus(tmp_path_factory.mktemp("answered"))


# -- rows ----------------------------------------------------------------------------------------------------


def prepared(folder: Path, *records: dict[str, object], seq_len: int) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "answers.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in records))
    data = schema.DataConfig(
        path=str(folder / "data"), source=[str(folder / "answers.jsonl")], format="answers", vocab_size=262
    )
    data.eval_fraction, data.seq_len, data.encoder_tokens = 0.0, seq_len, True
    return prepare(data, options=schema.PrepareConfig())


def batch_of(folder: Path, *, seq_len: int) -> AnswerBatch:
    """Of all its rows, in order; the last is not valid."""
    corpus = Corpus.open(folder)
    alone = Corpus(corpus.path, corpus.readers, corpus.facts, single=True)
    rows = alone.rows("train", seq_len=seq_len, documents=True, vocab=VOCAB)
    order = np.argsort([rows.documents(row)[0] for row in range(len(rows))])
    batch = QuestionAnswering(tokens={"pad": 0}).collate(rows.gather(order), valid=len(rows) - 1)
    assert isinstance(batch, AnswerBatch)
    return batch


def test_a_row_is_a_question_and_its_context_with_the_ends_of_the_answer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = prepared(tmp_path, GOOD, {**GOOD, "context": "Ada.", "answer_start": 0}, GOOD, seq_len=32)
    batch, tokenizer = batch_of(folder, seq_len=32), AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert batch.labels_BT[2].tolist() == [IGNORE_INDEX] * 32
    for row, context in enumerate((GOOD["context"], "Ada.")):
        pair = tokenizer(GOOD["question"], context, return_token_type_ids=True, return_offsets_mapping=True)
        length = len(pair["input_ids"])
        assert batch.input_ids_BT[row].tolist() == [*pair["input_ids"], *[0] * (32 - length)]
        assert batch.segment_ids_BT[row].tolist() == [*pair["token_type_ids"], *[0] * (32 - length)]
        assert batch.position_ids_BT[row].tolist() == [*range(length), *range(32 - length)]
        first, last, *rest = batch.labels_BT[row].tolist()
        spans, text = pair["offset_mapping"], str(context)
        assert text[spans[first][0] : spans[last][1]].strip() == "Ada"
        assert pair.sequence_ids()[first] == 1
        assert set(rest) == {IGNORE_INDEX}


def test_a_long_context_becomes_windows_and_a_long_question_is_left_out(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    context = " ".join(f"{number}" for number in range(10, 40))
    long = {"question": "Q", "context": context, "answer": "23", "answer_start": context.index("23")}
    whole = {"question": "Q", "context": context, "answer": context, "answer_start": 0}
    folder = prepared(tmp_path, long, {**GOOD, "question": "Q " * 20}, whole, GOOD, seq_len=SEQ)
    facts = json.loads((folder / "corpus.json").read_text())
    assert {note: count for note, (count, _) in facts["notes"].items()} == dict.fromkeys(
        (WINDOWS, NO_ROOM, NO_TOKEN), 1
    )
    ids, labels = (getattr(batch_of(folder, seq_len=SEQ), name) for name in ("input_ids_BT", "labels_BT"))
    inside = [row for row in range(len(ids) - 1) if labels[row, 0] > 0]
    assert 0 < len(inside) < len(ids) - 1  # the other windows have the answer at [CLS]
    assert all(labels[row, :2].tolist() == [0, 0] for row in range(len(ids) - 1) if row not in inside)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    for row in inside:
        first, last = labels[row, :2].tolist()
        assert tokenizer.decode(ids[row, first : last + 1]).strip() == "23"
    assert int(Corpus.open(folder).readers["train"].sizes.max()) == SEQ + 1


BAD = {
    "elsewhere": (
        {**GOOD, "answer_start": 5},
        "its answer 'Ada' is not at character 5 of the context, where",
    ),
    "behind the end": (
        {**GOOD, "answer_start": 90},
        "is not at character 90 of the context, where is no text",
    ),
    "negative": ({**GOOD, "answer_start": -4}, "is not at character -4 of the context, where is no text"),
    "no answer": ({**GOOD, "answer": ""}, "its field 'answer' holds no text but ''"),
    "no number": ({**GOOD, "answer_start": "6"}, "its field 'answer_start' holds no number but '6'"),
    "no question": ({"context": "a", "answer": "a", "answer_start": 0}, "its field 'question' is missing"),
}


@pytest.mark.parametrize("name", BAD)
def test_records_without_an_answer_where_it_should_be_are_refused(tmp_path: Path, name: str) -> None:
    record, problem = BAD[name]
    with pytest.raises(UserError, match=r"answers\.jsonl line 1: ") as error:
        prepared(tmp_path, record, seq_len=SEQ)
    assert problem in str(error.value)


def test_rows_that_have_no_answer_are_refused() -> None:
    task, tokens = QuestionAnswering(tokens={}), np.array([[5, 6, 7]])
    for marks in (None, np.array([[0, 2, 0]]), np.array([[0, 6, 2]])):
        with pytest.raises(UserError, match=r"task\.kind=question_answering: its rows are no questions"):
            task.collate(Block(tokens, None, None, marks=marks), valid=1)


# -- training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout",
    ["zero3", *(pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name != "zero3")],
)
def test_a_layout_computes_what_one_process_does(
    folder: Path, plain: classified.Outcome, layout: str
) -> None:
    ranks = 4 if "pp2-tp2" in layout else 2
    found = run_ranks(ranks, classified.on_rank, answered.words("bert", folder, *LAYOUTS[layout]), ranks)
    expected = dataclasses.replace(plain, gradients=dict(plain.gradients), parameters=dict(plain.parameters))
    for name in NO_GRADIENT:
        for outcome in (expected, *found):  # Adam magnifies it
            outcome.parameters.pop(name, None)
        assert expected.gradients.pop(name).norm() < 1e-6
        assert all(rank.gradients.pop(name).norm() < 1e-6 for rank in found if name in rank.gradients)
    agree(found, expected)
    if layout in ("zero3", "dp2"):
        assert min(rank.fewest for rank in found) == 0


@pytest.fixture(scope="module")
def plain(folder: Path) -> classified.Outcome:
    return answered.in_one_process(answered.words("bert", folder))


@pytest.mark.slow
def test_parity_is_shown_for_a_model_without_segments(folder: Path, tmp_path: Path) -> None:
    layouts = ["dp_shard2-zero3", "tp2", "pp2"]
    argv = [word for word in answered.words("roberta", folder) if not word.startswith(("schedule", "train"))]
    assert main(["parity", *argv, f"parity.layouts=[{','.join(layouts)}]", f"run.dir={tmp_path}"]) == 0
    found = json.loads((tmp_path / "parity.json").read_text())
    assert [row["passed"] for row in found["layouts"]] == [True] * len(layouts)


# -- runs ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_answers_are_learned_and_plain_transformers_finds_the_same(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForQuestionAnswering

    more = ["train.log_every=20", "train.eval_every=20", "train.eval_rows=100", "parallel=single"]

    def trained(run: str, steps: int) -> None:
        argv = answered.words("bert", folder, *more, f"train.steps={steps}", f"run.dir={tmp_path / run}")
        runs.finished(1, [word if word != "optim.lr=0.001" else "optim.lr=0.003" for word in argv])

    trained("whole", 40)
    trained("cut", 20)
    trained("cut", 40)
    assert runs.rows(tmp_path / "cut") == runs.rows(tmp_path / "whole")
    assert main(["export", str(tmp_path / "cut")]) == 0
    assert main(["evaluate", str(tmp_path / "cut")]) == 0
    first, *_, last = (
        json.loads(line)
        for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
        if "eval_loss" in line
    )
    assert last["eval_loss"] < first["eval_loss"]
    found = json.loads((tmp_path / "cut" / "evaluation.json").read_text())
    for figure in ("loss", "exact_match"):
        assert found[figure] == pytest.approx(last[f"eval_{figure}"], rel=1e-5)

    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "cut" / "export")
    assert type(model).__name__ == "BertForQuestionAnswering"
    corpus = Corpus.open(folder)
    alone = Corpus(corpus.path, corpus.readers, corpus.facts, single=True)
    rows = alone.rows("eval", seq_len=SEQ, documents=True, vocab=VOCAB)
    batch = QuestionAnswering(tokens={"pad": 0}).collate(rows.gather(np.arange(len(rows))), valid=len(rows))
    (loss, exact), (count, _) = answered.by_hand(model, [batch])
    assert (exact / count, count) == (pytest.approx(found["exact_match"]), found["answers"])
    assert loss / count == pytest.approx(found["loss"], rel=1e-5)
    assert torch.isfinite(torch.tensor(loss))


REFUSED = {
    "words": (["data.path={words}"], "data.path={words}: its labels are not of answers in contexts"),
    "a decoder": ([tagged.MODELS["llama"]], "model.config.model_type=llama: transformers has no such"),
    "smoothing": (["task.label_smoothing=0.1"], "task.label_smoothing=0.1: question_answering does not read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused(folder: Path, tmp_path: Path, capsys, name: str) -> None:
    more, problem = REFUSED[name]
    words = tagged.corpus(tmp_path / "words", encoder=True) if name == "words" else ""
    argv = answered.words("bert", folder, "parallel=single", f"run.dir={tmp_path / 'run'}")
    if name == "a decoder":
        argv = [word for word in argv if not word.startswith("++model")]
    assert main(["train", *argv, *(word.replace("{words}", str(words)) for word in more)]) == 2
    assert problem.replace("{words}", str(words)) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
