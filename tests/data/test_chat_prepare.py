"""Conversations through `prepare`: the same tokens of every form; what is refused, counted or left out."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from hybridtrain.config import schema
from hybridtrain.data import blend, compatibility
from hybridtrain.data.indexed import IndexedReader
from hybridtrain.data.prepare import statistics
from hybridtrain.data.prepare.tokenize import prepare
from hybridtrain.errors import UserError
from tests import runs
from tests.data.talks import ANSWER, ASK, PLAIN
from tests.data.test_chat import CHATML, THINKING, tokenizer  # noqa: F401 - a fixture


@pytest.fixture
def folder(tmp_path, tokenizer) -> Path:  # noqa: F811
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "tok")
    return tmp_path


def thinking(folder: Path, tokenizer) -> Path:  # noqa: F811
    tokenizer.chat_template = THINKING
    tokenizer.save_pretrained(folder / "tok")
    return folder


def settings(folder: Path, records: list[dict], **fields: object) -> schema.DataConfig:
    source = folder / "talk.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    values = {
        "format": "chat",
        "tokenizer": str(folder / "tok"),
        "eval_fraction": 0.0,
        "seq_len": 256,
        "source": [str(source)],
    } | fields
    return schema.DataConfig(path=str(folder / "data"), **values)


def made(data: schema.DataConfig, **options: object) -> dict:
    return json.loads((prepare(data, options=schema.PrepareConfig(**options)) / "corpus.json").read_text())


def content(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "data/train.bin").read_bytes(), (folder / "data/train.loss.bin").read_bytes()


@pytest.mark.parametrize("form", ["array", "gz", "parquet", "datasets"])
def test_other_forms_in_other_files_give_the_same_tokens(folder, form):
    import datasets
    import pyarrow
    import pyarrow.parquet

    made(settings(folder, [{"messages": PLAIN}] * 3))
    expected = content(folder)
    record, source = (
        {"instruction": "How deep?", "input": "", "output": "Very.", "id": 7},
        folder / "alpaca.json",
    )
    if form == "array":
        source.write_text(json.dumps([record] * 3, indent=2))
    elif form == "gz":
        source = folder / "alpaca.jsonl.gz"
        source.write_bytes(gzip.compress((json.dumps(record) + "\n").encode() * 3))
    elif form == "parquet":
        source = folder / "alpaca.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record] * 3), source)
    else:
        source = folder / "alpaca"
        datasets.Dataset.from_list([record] * 3).save_to_disk(source)
    facts = made(settings(folder, [], source=[str(source)]), overwrite=True)
    assert content(folder) == expected
    assert (facts["forms"], facts["unread"]) == ({"instruction and output": 3}, {"id": 3})


def test_tools_of_parquet_reach_the_template_and_other_columns_are_counted(folder, tokenizer):  # noqa: F811
    import pyarrow
    import pyarrow.parquet

    tokenizer.chat_template = "{{ tools|tojson if tools else '' }}" + CHATML
    tokenizer.save_pretrained(folder / "tok")
    rows = [
        {"messages": PLAIN, "tools": '[{"name": "f"}]', "rating": 5},
        {"messages": PLAIN, "tools": None, "rating": 1},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "talk.parquet")
    facts = made(settings(folder, [], source=[str(folder / "talk.parquet")]))
    reader = IndexedReader(folder / "data/train")
    assert '[{"name": "f"}]<|im_start|>user' in tokenizer.decode(np.array(reader.read(0, reader.tokens)))
    assert (facts["unread"], facts["notes"]) == ({"rating": 2}, {})


def test_bad_content_is_refused_with_its_line_and_never_trained_on(folder):
    records = [
        {"messages": PLAIN},
        {"messages": [ASK, {"role": "assistant", "content": {"answer": "calm"}}]},
        {"messages": PLAIN},
    ]
    with pytest.raises(
        UserError, match=r"talk\.jsonl line 2: message 1 \(assistant\): its content is an object, not text"
    ):
        made(settings(folder, records))
    facts = made(settings(folder, records), skip_bad=True)
    assert (facts["bad_records"], facts["splits"]["train"]["documents"]) == (1, 2)
    with pytest.raises(
        UserError,
        match=(
            r"line 1: it is a preference pair[\s\S]*not supported yet[\s\S]*"
            "try: +conversations with the chosen answer alone"
        ),
    ):
        made(settings(folder, [{"chosen": "a", "rejected": "b"}]), overwrite=True)


def test_a_tool_call_that_is_not_rendered_is_refused_with_its_line(folder):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    with pytest.raises(
        UserError,
        match=(
            r"line 2: message 1 \(assistant\) has tool calls that the "
            r"chat template of data\.tokenizer=\S*/tok does not render"
        ),
    ) as caught:
        made(settings(folder, [{"messages": PLAIN}, {"messages": [ASK, call]}]))
    assert ".partial" not in str(caught.value)


def test_samples_of_a_conversation_are_on_one_side_and_no_duplicates_of_one_another(folder, tokenizer):  # noqa: F811
    talks = [
        {"messages": [ASK, ANSWER, {"role": "user", "content": f"{number}?"}, ANSWER]} for number in range(40)
    ]
    facts = made(
        settings(thinking(folder, tokenizer), talks + talks[:3], eval_fraction=0.3, deduplicate=True)
    )
    seen = {}
    for split in ("train", "eval"):
        reader = IndexedReader(folder / "data" / split)
        ends = np.cumsum(reader.sizes)
        texts = [
            tokenizer.decode(np.array(reader.read(end - size, end)))
            for end, size in zip(ends, reader.sizes, strict=True)
        ]
        assert len(texts) % 2 == 0
        for short, long in zip(texts[::2], texts[1::2], strict=True):
            assert long.count("assistant") == 2 > short.count("assistant")
            seen[long] = split
    assert len(seen) == 40
    assert set(seen.values()) == {"train", "eval"}
    assert sum(split["documents"] for split in facts["splits"].values()) == 80
    assert (facts["conversations"], facts["duplicates"]) == (43, 6)
    words = (
        "conversations with a sample for each answer, since the template renders earlier answers differently"
    )
    assert facts["notes"] == {words: [43, f"{folder}/talk.jsonl line 1"]}
    assert f"43 {words}, first {folder}/talk.jsonl line 1" in statistics.table(folder / "data")
    with pytest.raises(UserError, match=r"data\.chat_turns=last: .*prepared with all"):
        made(settings(folder, talks + talks[:3], eval_fraction=0.3, deduplicate=True, chat_turns="last"))


def test_the_summary_says_what_was_read_and_where_answers_end(folder):
    made(
        settings(
            folder,
            [
                {"messages": PLAIN, "id": 1},
                {"messages": [ASK, {"role": "assistant", "content": ""}]},
                {"prompt": "a", "completion": "b"},
            ],
        )
    )
    lines = [line.strip() for line in statistics.table(folder / "data").splitlines()]
    assert "records    messages of role and content: 2" in lines
    assert "records    prompt and completion: 1" in lines
    assert "fields that are not read: id (1)" in lines
    assert (
        "1 conversations with an empty answer, "
        f"of which only the end is trained, first {folder}/talk.jsonl line 2"
    ) in lines
    assert (
        "answers end with <|im_end|>; the tokenizer's end of text is <|endoftext|>: "
        "exports end a text with either"
    ) in lines


# -- nothing to learn ----------------------------------------------------------------------------------------

LONG = {"messages": [{"role": "user", "content": "word " * 80}, ANSWER]}


def test_conversations_whose_answers_are_cut_off_are_left_out_and_counted(folder):
    facts = made(
        settings(
            folder,
            [LONG, {"messages": PLAIN}, LONG, {"messages": [ASK, {**ANSWER, "weight": 0}]}],
            seq_len=64,
        )
    )
    train = facts["splits"]["train"]
    assert facts["notes"] == {
        "conversations without an answer within data.seq_len tokens, left out": [
            2,
            f"{folder}/talk.jsonl line 1",
        ],
        "conversations whose answers are all excluded from the loss, left out": [
            1,
            f"{folder}/talk.jsonl line 4",
        ],
    }
    assert (train["documents"], train["loss_tokens"], train["kept_tokens"]) == (
        1,
        len("Very.") + 1,
        train["tokens"],
    )
    share = train["loss_tokens"] / train["tokens"]
    assert f"{share:.1%} of the tokens carry loss" in statistics.table(folder / "data")
    with pytest.raises(
        UserError,
        match=(
            r"data\.seq_len=64: in no conversation of the train "
            "split does an answer begin within this many tokens"
        ),
    ):
        made(settings(folder, [LONG] * 8, seq_len=64), overwrite=True)
    with pytest.raises(
        UserError, match=r"^data\.source=.*: every answer of the train split is excluded from the loss"
    ):
        made(settings(folder, [{"messages": [ASK, {**ANSWER, "weight": 0}]}] * 8, seq_len=64), overwrite=True)


def test_targets_are_counted_after_cutting(folder):
    """An answer of which half is left: 6 tokens of its 11."""
    head = "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"
    tokens = 3 + len(head.replace("<|im_start|>", "").replace("<|im_end|>", ""))
    facts = made(
        settings(
            folder,
            [
                {
                    "messages": [
                        {"role": "user", "content": "?"},
                        {"role": "assistant", "content": "0123456789"},
                    ]
                }
            ],
            seq_len=tokens + 5,
        )
    )
    train = facts["splits"]["train"]
    assert (train["cut"], train["loss_tokens"], train["kept_tokens"]) == (1, 6, tokens + 6)


@pytest.fixture
def without_targets(folder) -> Path:
    """As an earlier version prepared it: its figures count targets that are cut off, and
    some rows have none."""
    facts = made(
        settings(
            folder,
            [{"messages": [{"role": "user", "content": f"{n}?"}, ANSWER]} for n in range(40)],
            seq_len=64,
            eval_fraction=0.3,
        )
    )
    for split in facts["splits"].values():
        del split["kept_tokens"]
    facts.pop("digests", None)
    (folder / "data/corpus.json").write_text(json.dumps(facts))
    return folder / "data"


def blank(data: Path, split: str, *, share: float) -> None:
    mask = np.memmap(data / f"{split}.loss.bin", mode="r+", dtype="u1")
    mask[: int(len(mask) * share)] = 0
    mask.flush()


def test_a_corpus_without_targets_is_refused(without_targets):
    opened = blend.open_data(schema.DataConfig(path=str(without_targets)), timeout_s=0)
    compatibility.check_train_rows(opened, seq_len=64)
    blank(without_targets, "train", share=1)
    with pytest.raises(UserError, match=r"data\.path=.*no token of .* carries loss: every answer is cut off"):
        compatibility.check_train_rows(opened, seq_len=64)
    compatibility.check_eval_rows(opened, seq_len=64, field="train.eval_every", value=2)
    blank(without_targets, "eval", share=1)
    with pytest.raises(UserError, match=r"train\.eval_every=2: no token of the held-out part"):
        compatibility.check_eval_rows(opened, seq_len=64, field="train.eval_every", value=2)


def test_steps_without_targets_have_no_loss_and_are_counted(without_targets, tmp_path):
    blank(without_targets, "train", share=0.8)
    options = {
        "data__seq_len": 64,
        "batch__global_batch_size": 1,
        "train__steps": 12,
        "train__eval_every": 12,
    }
    runs.finished(1, runs.arguments(tmp_path / "run", without_targets, **options))
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    empty = [row for row in rows if "steps_without_targets" in row]
    assert 0 < len(empty) < 12
    for row in rows:
        assert (row["loss"] is None) == (row in empty)
        assert row["skipped"] == 0
    assert rows[-1]["eval_loss"] > 0
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["kind"] == "empty"] == [row["step"] for row in empty]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["final_loss"] == [row["loss"] for row in rows if row["loss"] is not None][-1]


def test_an_evaluation_of_rows_without_targets_is_refused(without_targets, tmp_path):
    reader = IndexedReader(without_targets / "eval.loss")
    blank(without_targets, "eval", share=float(reader.sizes[:-1].sum()) / reader.tokens)
    ended = runs.on_ranks(
        1,
        runs.arguments(
            tmp_path / "run", without_targets, data__seq_len=64, train__eval_every=1, train__eval_rows=1
        ),
    )
    assert "none of the held-out rows" in runs.four_parts(ended.err, "train.eval_rows")
