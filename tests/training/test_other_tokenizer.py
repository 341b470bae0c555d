"""A model and data of different tokenizers go together as long as the ids fit, and that is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hybridtrain.cli.main import main
from hybridtrain.data import vocabulary
from tests.runs import arguments, corpus, finished

WORDS = "the model's tokenizer"


def apart(one: Path, other: Path) -> int:
    """Ids that stand for other tokens, with a reader of their own."""
    ours, theirs = (
        {number: token for token, number in AutoTokenizer.from_pretrained(folder).get_vocab().items()}
        for folder in (one, other)
    )
    return sum(ours.get(number) != theirs.get(number) for number in ours | theirs)


def test_training_and_evaluation_say_that_the_data_are_of_another_tokenizer(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = corpus(tmp_path / "other", words="comes after")
    run = tmp_path / "run"
    assert WORDS not in finished(1, arguments(run, data, train__steps=1)).out
    assert main(["export", str(run)]) == 0
    begun = [
        text
        for text in arguments(
            tmp_path / "tuned", other, model__from_pretrained=run / "export", train__steps=1
        )
        if not text.startswith("model=")
    ]
    number = apart(run / "export", other / "tokenizer")
    assert 20 < number < 300
    told = (
        f"warning: {WORDS} ({run}/export) and that of the data ({other}/tokenizer) "
        f"are not the same: {number} of 300 tokens differ"
    )
    assert told in finished(1, begun).out
    said = finished(1, arguments(tmp_path / "branch", other, run__branch_from=run, train__steps=2)).out
    kept = run / "checkpoints" / "step-00000001" / "tokenizer"
    assert (
        f"{WORDS} ({kept}) and that of the data ({other}/tokenizer) are not the same: {number} of 300 tokens"
        in said
    )
    assert "at step 1, 256 tokens; with other data: " in said
    same = [text.replace(str(other), str(data)) for text in begun]
    assert WORDS not in finished(1, [*same, f"run.dir={tmp_path / 'same'}"]).out
    assert (
        main(
            [
                "evaluate",
                f"evaluate.source={run}/export",
                f"data.path={data}",
                "data.seq_len=32",
                "evaluate.rows=2",
            ]
        )
        == 0
    )
    assert WORDS not in capsys.readouterr().out
    assert (
        main(
            [
                "evaluate",
                f"evaluate.source={run}/export",
                f"data.path={other}",
                "data.seq_len=32",
                "evaluate.rows=2",
            ]
        )
        == 0
    )
    assert (
        f"({run}/export) and that of the data ({other}/tokenizer) are not the same: {number} of 300 tokens"
        in capsys.readouterr().out
    )


def test_a_tokenizer_that_was_saved_again_is_the_same(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = data / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(own)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path / "again")
    content = json.loads((own / "tokenizer.json").read_text())
    content["model"]["merges"] = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]
    ]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "tokenizer.json").write_text(json.dumps(content, indent=4))
    for folder in (tmp_path / "again", tmp_path / "old", tmp_path / "none"):
        vocabulary.compare(folder, own)
        vocabulary.compare(own, folder)
    vocabulary.compare(own, None)
    assert caplog.text == ""
    content["model"]["merges"][:2] = content["model"]["merges"][1::-1]
    (tmp_path / "old" / "tokenizer.json").write_text(json.dumps(content))
    vocabulary.compare(tmp_path / "old", own)
    assert "are not the same: 2 merges differ" in caplog.text
    (tmp_path / "old" / "tokenizer.json").write_text('{"model": []}')
    vocabulary.compare(tmp_path / "old", own)
    assert "it is not known whether model and data have the same tokenizer" in caplog.text
