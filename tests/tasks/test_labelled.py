"""Records of texts with labels: which are read, which are refused with their line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tasks.labelled import prepare


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (
            {"text": "a", "label": "poetry"},
            "line 2: its field 'label' holds 'poetry', which is none of prose, code, nor a number below 2",
        ),
        ({"text": "a", "label": 2}, "line 2: its field 'label' holds 2,"),
        ({"text": "a", "label": True}, "line 2: its field 'label' holds True,"),
        ({"text": "a"}, "line 2: its field 'label' is missing or null"),
        ({"text": 7, "label": 1}, "line 2: its field holds no text but 7"),
    ],
)
def test_a_record_without_a_label_of_the_list_is_refused_with_its_line(
    tmp_path: Path, capsys, record: dict[str, object], problem: str
) -> None:
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": "fine", "label": 1}) + "\n" + json.dumps(record) + "\n"
    )
    assert prepare(tmp_path / "a.jsonl", tmp_path / "out", "data.eval_fraction=0") == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "out" / "corpus.json").exists()


@pytest.mark.parametrize(
    ("labels", "problem"),
    [("[]", "fewer than two classes"), ("[a]", "fewer than two classes"), ("[a,b,a]", "a name occurs twice")],
)
def test_classes_that_are_none_are_refused(tmp_path: Path, capsys, labels: str, problem: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "fine", "label": 1}))
    assert prepare(tmp_path / "a.jsonl", tmp_path / "out", f"data.labels={labels}") == 2
    assert problem in capsys.readouterr().err


def test_numbers_names_and_fields_of_other_names_are_read(tmp_path: Path) -> None:
    records = [
        {"body": "one two", "kind": 0},
        {"body": "three", "kind": "code"},
        {"body": "four", "kind": 1.0},
        {"body": "", "kind": 0},
    ]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in records))
    assert (
        prepare(
            tmp_path / "a.jsonl",
            tmp_path / "out",
            "data.eval_fraction=0",
            "data.text_key=body",
            "data.label_key=kind",
        )
        == 0
    )
    facts = json.loads((tmp_path / "out" / "corpus.json").read_text())
    assert facts["forms"] == {"prose": 1, "code": 2}
    assert facts["splits"]["train"]["loss_tokens"] == 3
    assert list(facts["notes"]) == ["documents without text, left out"]
