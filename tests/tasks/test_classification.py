"""Classification: texts with labels to rows, a head with a row for each class under every layout, accuracy,
and the export in plain transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import hybridtrain as ht
from hybridtrain.cli.main import main
from hybridtrain.data.corpus import Corpus
from hybridtrain.data.indexed import IndexedReader
from hybridtrain.data.rows import Block
from hybridtrain.errors import UserError
from hybridtrain.tasks.classification import Classification
from hybridtrain.types import IGNORE_INDEX
from tests import runs
from tests.tasks.labelled import LABELS, SEQ, prepare, texts

OPTIONS = {
    "task": "classification",
    "model__config__vocab_size": 512,
    "data__seq_len": SEQ,
    "batch__global_batch_size": 16,
    "batch__micro_batch_size": 4,
    "train__steps": 40,
    "train__log_every": 10,
    "train__eval_every": 40,
    "train__eval_rows": 400,
    "optim__lr": 0.002,
}
SHORT = {
    "train__steps": 8,
    "train__log_every": 1,
    "train__eval_every": 8,
    "train__eval_rows": 64,
    "optim__lr": 3e-4,
    "optim__eps": 1e-6,
}
"""Before Adam has magnified the rounding of other sums."""
LAYOUTS = {
    "tp2": (2, {"parallel__tp": 2}),
    "pp2": (2, {"parallel__pp": 2}),
    "zero3": (2, {"parallel__dp_replicate": 1, "parallel__dp_shard": 2, "parallel__zero_stage": 3}),
    "pp2-tp2": (4, {"parallel__pp": 2, "parallel__tp": 2}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("labelled")
    (root / "texts.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in texts()))
    prepare(root / "texts.jsonl", root / "data")
    return root / "data"


def evaluation(run: Path) -> dict[str, float]:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    runs.finished(1, runs.arguments(run, folder, **OPTIONS))
    assert main(["export", str(run)]) == 0
    return run


# -- data ----------------------------------------------------------------------------------------------------


def test_a_text_is_followed_by_the_number_of_its_class_which_alone_carries_loss(folder: Path) -> None:
    from transformers import AutoTokenizer

    corpus, tokenizer = Corpus.open(folder), AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert corpus.labels == LABELS
    loss = IndexedReader(folder / "train.loss")
    by_ids = {
        tuple(tokenizer(each["text"])["input_ids"][:SEQ]): LABELS.index(str(each["label"]))
        for each in texts()
    }
    reader = corpus.readers["train"]
    for number in range(0, reader.documents, 17):
        start, size = int(reader.pointers[number]) // reader.dtype.itemsize, int(reader.sizes[number])
        *ids, label = reader.read(start, start + size).tolist()
        assert by_ids[tuple(ids)] == label
        assert loss.read(start, start + size).tolist() == [0] * len(ids) + [1]


def test_labels_that_the_model_has_no_class_for_are_refused() -> None:
    carries = np.zeros((1, 4), dtype=bool)
    carries[0, 2] = True
    task = Classification(labels=2)
    batch = task.collate(Block(np.array([[5, 6, 1, 0]]), None, carries), valid=1)
    assert batch.labels_BT.tolist() == [[IGNORE_INDEX, 1, IGNORE_INDEX]]
    with pytest.raises(UserError, match=r"model\.labels=2: a row has label 7, the model has 2 classes"):
        task.collate(Block(np.array([[5, 6, 7, 0]]), None, carries), valid=1)
    with pytest.raises(UserError, match=r"task\.kind=classification: its rows have no labels"):
        task.collate(Block(np.array([[5, 6, 7, 0]]), None, None), valid=1)


# -- training ------------------------------------------------------------------------------------------------


def test_real_texts_are_told_apart_and_plain_transformers_finds_the_same_classes(
    trained: Path, folder: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    assert evaluation(trained)["eval_accuracy"] > 0.9
    assert main(["evaluate", str(trained), "evaluate.rows=400"]) == 0
    found = json.loads((trained / "evaluation.json").read_text())
    assert found["accuracy"] == pytest.approx(evaluation(trained)["eval_accuracy"], abs=1e-9)
    assert found["loss"] == pytest.approx(evaluation(trained)["eval_loss"], rel=1e-5)

    export = trained / "export"
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(export),
        AutoTokenizer.from_pretrained(export),
    )
    assert model.config.id2label == dict(enumerate(LABELS))
    corpus = Corpus.open(folder)
    reader, held_out = corpus.readers["eval"], []
    for number in range(reader.documents):
        start = int(reader.pointers[number]) // reader.dtype.itemsize
        held_out.append(reader.read(start, start + int(reader.sizes[number])).tolist())
    tokenizer.pad_token_id = model.config.pad_token_id
    batch = tokenizer.pad({"input_ids": [ids for *ids, _ in held_out]}, return_tensors="pt")
    with torch.no_grad():
        classes = model(**batch).logits.argmax(-1).tolist()
    right = sum(found == label for found, (*_, label) in zip(classes, held_out, strict=True))
    assert (right / len(held_out), len(held_out)) == (
        pytest.approx(found["accuracy"], abs=1e-9),
        found["documents"],
    )


@pytest.fixture(scope="module")
def short(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("short") / "run"
    runs.finished(1, runs.arguments(run, folder, **OPTIONS | SHORT))
    return run


@pytest.mark.parametrize(
    "name", ["tp2", *(pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name != "tp2")]
)
def test_a_layout_learns_what_one_process_learns(
    short: Path, folder: Path, tmp_path: Path, name: str
) -> None:
    ranks, options = LAYOUTS[name]
    runs.finished(ranks, runs.arguments(tmp_path / "run", folder, **OPTIONS | SHORT | options))
    for ours, theirs in zip(runs.rows(tmp_path / "run"), runs.rows(short), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    ours, theirs = evaluation(tmp_path / "run"), evaluation(short)
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-5)
    assert ours["eval_accuracy"] == theirs["eval_accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_every_layout_computes_the_gradients_of_the_plain_classifier(
    folder: Path, tmp_path: Path, engine: str
) -> None:
    words = [
        "parity",
        "model=tiny",
        "task=classification",
        f"data.path={folder}",
        f"data.seq_len={SEQ}",
        "batch.global_batch_size=8",
        f"run.dir={tmp_path}",
    ]
    layouts = [
        "single",
        "tp2",
        "pp2",
        "dp_shard2-zero1",
        "dp_shard2-zero3",
        "pp2-tp2",
        *(["pp2-zbv_zero_bubble"] if engine == "torch" else []),
    ]
    assert (
        main(
            [
                *words,
                "batch.micro_batch_size=2",
                f"parity.layouts=[{','.join(layouts)}]",
                f"parity.engines=[{engine}]",
            ]
        )
        == 0
    )
    told = json.loads((tmp_path / "parity.json").read_text())
    assert [row["passed"] for row in told["layouts"]] == [True] * len(layouts)


@pytest.mark.slow
def test_a_run_of_a_classifier_goes_on_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    options = {
        **OPTIONS,
        "train__steps": 6,
        "train__log_every": 1,
        "train__eval_every": 3,
        "train__eval_rows": 16,
    }
    runs.finished(1, runs.arguments(tmp_path / "whole", folder, **options))
    runs.finished(1, runs.arguments(tmp_path / "cut", folder, **options | {"train__steps": 3}))
    runs.finished(1, runs.arguments(tmp_path / "cut", folder, **options))
    assert runs.rows(tmp_path / "cut") == runs.rows(tmp_path / "whole")


# -- pretrained models, rows of one's own, refusals ----------------------------------------------------------


def test_a_classifier_begins_from_a_causal_model_and_goes_on_from_a_classifier(
    trained: Path, folder: Path, tmp_path: Path, data: Path, capsys
) -> None:
    lm = tmp_path / "lm"
    runs.finished(1, runs.arguments(lm, data, train__steps=1, model__config__vocab_size=512))
    assert main(["export", str(lm)]) == 0
    options = {**OPTIONS, "train__steps": 1, "train__eval_every": 0}
    words = [
        word
        for word in runs.arguments(tmp_path / "run", folder, **options)
        if not word.startswith(("model=", "model.config"))
    ]
    assert main(["train", *words, f"model.from_pretrained={lm / 'export'}"]) == 0
    said = capsys.readouterr()
    assert "score.weight: drawn as in a new model, a row for each class" in said.out + said.err
    assert "lm_head.weight of the files is left out" in said.out + said.err

    again = [word.replace(str(tmp_path / "run"), str(tmp_path / "again")) for word in words]
    assert main(["train", *again, f"model.from_pretrained={trained / 'export'}"]) == 0
    said = capsys.readouterr()
    assert "drawn as in a new model" not in said.out + said.err
    first = json.loads((tmp_path / "again" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] < 0.3  # the head, too, is the trained one


def test_rows_of_ones_own_have_one_label_each(tmp_path: Path) -> None:
    class Rows:
        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> dict[str, object]:
            return {"input_ids": [10 + index % 2] * (5 + index % 7), "label": index % 2}

    options = [
        "model=tiny",
        "model.config.vocab_size=64",
        "task=classification",
        "model.labels=[even,odd]",
        "data.seq_len=16",
        "schedule=constant",
    ]
    config = ht.compose(
        *options,
        "train.steps=20",
        "train.eval_every=20",
        "optim.lr=0.01",
        f"run.dir={tmp_path}",
        "batch.global_batch_size=8",
        "parallel=single",
    )
    assert ht.Trainer(config, data=Rows(), eval_data=Rows()).fit().status == "finished"
    assert evaluation(tmp_path)["eval_accuracy"] == 1.0


REFUSED = {
    "no classes": (
        ["task=classification", "data.path={text}"],
        r"data.path={text}: its documents have no labels",
    ),
    "other classes": (
        ["task=classification", "data.path={folder}", "model.labels=[a,b]"],
        r"model.labels=[a,b]: {folder} has the labels prose, code",
    ),
    "causal": (
        ["data.path={folder}", "model.labels=[prose,code]"],
        r"task.kind=causal_lm: the model is a classifier of 2 classes",
    ),
    "task": (
        ["task.kind=regression", "data.path={folder}"],
        r"task.kind=regression: not one of the kinds there are",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused_before_anything_is_written(
    folder: Path, data: Path, tmp_path: Path, capsys, name: str
) -> None:
    words, problem = REFUSED[name]
    fill = lambda text: text.replace("{text}", str(data)).replace("{folder}", str(folder))  # noqa: E731
    base = [
        "train",
        "model=tiny",
        f"data.seq_len={SEQ}",
        "train.steps=1",
        f"run.dir={tmp_path / 'run'}",
        "parallel=single",
    ]
    assert main([*base, *map(fill, words)]) == 2
    assert fill(problem) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_classifier_writes_no_text_and_is_not_timed(trained: Path, capsys) -> None:
    assert main(["generate", str(trained), "generate.prompt=x"]) == 2
    assert "it is a classifier, which writes no text" in capsys.readouterr().err
    assert main(["bench", "model=tiny", "task=classification", "model.labels=[a,b]"]) == 2
    assert "task.kind=classification: bench times next-token prediction only" in capsys.readouterr().err
