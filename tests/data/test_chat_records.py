"""Records of conversations: which forms are read, what of them is refused or counted, and what `prepare` says of it."""

import gzip
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from hybridtrain.config import schema
from hybridtrain.data import blend
from hybridtrain.data.indexed import IndexedReader
from hybridtrain.data.prepare import statistics
from hybridtrain.data.prepare.conversations import NOT_YET, Conversation, Unreadable, read
from hybridtrain.data.prepare.tokenize import prepare
from hybridtrain.errors import UserError
from tests import runs
from tests.data.test_chat import CHATML, THINKING, tokenizer  # noqa: F401 - a fixture

ROOT = Path(__file__).resolve().parents[2]
ASK, ANSWER = {"role": "user", "content": "How deep?"}, {"role": "assistant", "content": "Very."}
PLAIN = [ASK, ANSWER]


def parsed(record: dict) -> Conversation:
    found = read(record, key="messages")
    assert found is not None
    return found


# -- forms ---------------------------------------------------------------------------------------------------------

FORMS = [
    ({"messages": PLAIN}, PLAIN, "messages of role and content"),
    ({"conversations": [{"from": "human", "value": "How deep?"}, {"from": "gpt", "value": "Very."}]}, PLAIN, "conversations of from and value"),
    ({"conversations": PLAIN}, PLAIN, "conversations of role and content"),
    ({"prompt": "How deep?", "completion": "Very."}, PLAIN, "prompt and completion"),
    ({"prompt": [ASK], "completion": [ANSWER]}, PLAIN, "prompt and completion"),
    ({"instruction": "How deep?", "input": "", "output": "Very."}, PLAIN, "instruction and output"),
    ({"instruction": "How deep?", "output": "Very."}, PLAIN, "instruction and output"),
    (
        {"instruction": "How deep?", "input": "The sea.", "output": "Very.", "history": [["Hi", "Ho"]], "system": "Be."},
        [
            {"role": "system", "content": "Be."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Ho"},
            {"role": "user", "content": "How deep?\n\nThe sea."},
            ANSWER,
        ],
        "instruction and output",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "How "}, {"type": "text", "text": "deep?"}]}, ANSWER]}, PLAIN, ""),
    ({"messages": [ASK, {"role": "assistant", "content": [{"type": "text", "text": "Very."}]}]}, PLAIN, ""),
    ({"messages": PLAIN, "system": ""}, PLAIN, ""),
    ({"messages": PLAIN, "tools": "[]", "chat_template_kwargs": None}, PLAIN, ""),
    (
        {
            "conversations": [
                {"from": "human", "value": "?"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "11"},
            ]
        },
        [
            {"role": "user", "content": "?"},
            {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]},
            {"role": "tool", "content": "11"},
        ],
        "",
    ),
]


@pytest.mark.parametrize(("record", "messages", "form"), FORMS)
def test_every_usual_form_comes_to_the_same_messages(record, messages, form):
    found = parsed(record)
    assert found.messages == messages
    assert form in ("", found.form)
    assert (found.tools, found.options, found.unread) == (None, {}, [])
    if messages == PLAIN:
        assert found.content == json.dumps(PLAIN, sort_keys=True).encode()  # the same split, whatever the form


def test_what_stands_beside_the_messages_is_read_or_named():
    tools = [{"type": "function", "function": {"name": "f"}}]
    for given in (tools, json.dumps(tools)):
        found = parsed(
            {"messages": PLAIN, "tools": given, "system": "Be.", "chat_template_kwargs": {"enable_thinking": False, "no": None}, "id": 7, "no": None}
        )
        assert (found.tools, found.options, found.unread) == (tools, {"enable_thinking": False}, ["id"])
        assert found.messages == [{"role": "system", "content": "Be."}, *PLAIN]
    assert parsed({"messages": PLAIN, "tools": tools}).content != parsed({"messages": PLAIN}).content
    assert read({"messages": []}, key="messages") is None


def test_loss_lies_on_the_completion_and_on_answers_with_weight():
    assert parsed({"prompt": PLAIN, "completion": [ANSWER]}).trains == [False, False, True]
    assert parsed({"prompt": PLAIN, "completion": [ANSWER], "system": "Be."}).trains == [False, False, False, True]
    assert parsed({"messages": [ASK, {**ANSWER, "weight": 0}, {**ASK, "weight": None}, {**ANSWER, "train": True}]}).trains == [False, False, False, True]
    assert parsed({"messages": [{**ASK, "weight": 0}, {**ANSWER, "weight": 1.0}]}).messages == PLAIN


BAD = [
    ([ASK, {"role": "assistant", "content": 42}], r"message 1 \(assistant\): its content is a number, not text"),
    ([{"role": "user", "content": 4.5}, ANSWER], r"message 0 \(user\): its content is a number, not text"),
    ([ASK, {"role": "assistant", "content": {"answer": "calm"}}], r"message 1 \(assistant\): its content is an object, not text"),
    ([ASK, {"role": "assistant", "content": True}], r"message 1 \(assistant\): its content is true or false, not text"),
    ([{"role": "system", "content": ["a"]}, *PLAIN], r"message 0 \(system\): its content is a list with text in it; allowed are parts of type text"),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER],
        r"message 0 \(user\): its content has a part of type 'image_url', and only text is supported",
    ),
    ([ASK, {"role": "assistant", "content": None}], r"message 1 \(assistant\) has no content and no tool_calls"),
    ([ASK, {"role": "assistant", "content": []}], r"message 1 \(assistant\) has no content and no tool_calls"),
    ([ASK, {"role": "assistant", "tool_calls": []}], r"message 1 \(assistant\) has no content and no tool_calls"),
    ([{"role": "user"}, ANSWER], r"message 0 \(user\) has no content"),
    ([ASK, {"role": "assistant", "tool_calls": {"name": "f"}}], r"message 1 \(assistant\): its tool_calls are an object, no list"),
    ([ASK, {"role": "assistant", "tool_calls": [{"id": "1"}]}], r"message 1 \(assistant\): a tool call has no function with a name"),
    ([ASK, {**ANSWER, "weight": 0.5}], r"message 1 \(assistant\) has weight 0.5; only 0, 1, true and false are supported"),
    ([{**ASK, "train": True}, ANSWER], r"message 0 \(user\) asks for loss by train, and only answers of the assistant get any"),
    ([ASK, {**ANSWER, "weight": 1, "train": False}], r"message 1 \(assistant\): weight and train contradict each other"),
    ([{"from": "narrator", "value": "x"}, ANSWER], r"message 0 is from 'narrator', which is none of human, "),
    ([ASK, {"from": "function_call", "value": "f(1)"}], r"message 1 is a function_call whose value is no JSON object with name and arguments"),
    (["hello"], r"message 0 is text, no object with a role"),
    ([{"content": "x"}], r"message 0 is no object with a role"),
    ("hello", r"its field 'messages' is text, no list of messages"),
    ([ASK], r"it has no assistant message, so nothing to learn"),
    ([ANSWER], r"it begins with the assistant's answer"),
]


@pytest.mark.parametrize(("messages", "words"), BAD)
def test_what_is_no_conversation_is_refused_in_true_words(messages, words):
    with pytest.raises(Unreadable, match=f"^{words}"):
        read({"messages": messages}, key="messages")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, NOT_YET.replace("(", r"\(").replace(")", r"\)")),
        ({"text": "x", "id": 1}, r"its field 'messages' is missing or null \(its fields: 'text', 'id'\)"),
        ({"prompt": 3, "completion": "x"}, "its field 'prompt' is a number, neither text nor a list of messages"),
        ({"instruction": "x", "output": ["y"]}, "its field 'output' is a list, not text"),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, r"its field 'history' is no list of \[question, answer\]"),
        ({"messages": PLAIN, "tools": "not JSON"}, "its field 'tools' is text that is not JSON"),
        ({"messages": PLAIN, "tools": {"a": 1}}, "its field 'tools' is an object, no list of objects"),
        ({"messages": PLAIN, "system": 3}, "its field 'system' is a number, not text"),
        (
            {"messages": [{"role": "system", "content": "Be."}, *PLAIN], "system": "Be."},
            "it has a field 'system', and its messages begin with a system message too",
        ),
        ({"messages": PLAIN, "chat_template_kwargs": {"tools": []}}, "its field 'chat_template_kwargs' sets 'tools', which is not for a record to decide"),
    ],
)
def test_records_that_cannot_be_read_are_refused(record, words):
    with pytest.raises(Unreadable, match=f"^{words}"):
        read(record, key="messages")


def anything(draw: random.Random, depth: int) -> object:
    """A JSON value; keys are those that mean something."""
    kinds = ["text", "number", "flag", "null", *(["list", "object", "object"] if depth else [])]
    match draw.choice(kinds):
        case "text":
            return draw.choice(["user", "assistant", "human", "gpt", "text", "function_call", "", "{", "[]", '{"name": "f", "arguments": {}}', "\ud800"])
        case "number":
            return draw.choice([0, 1, -1, 0.5, float("nan"), 10**400])
        case "flag":
            return draw.random() < 0.5
        case "null":
            return None
        case "list":
            return [anything(draw, depth - 1) for _ in range(draw.randrange(3))]
    keys = ("role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "type", "text", "weight", "train", "messages", "tools", "system")
    return {draw.choice(keys): anything(draw, depth - 1) for _ in range(draw.randrange(5))}


def test_whatever_a_record_holds_it_is_read_or_refused():
    draw, read_ones = random.Random(0), 0
    names = (
        "messages",
        "conversations",
        "prompt",
        "completion",
        "instruction",
        "input",
        "output",
        "history",
        "tools",
        "system",
        "chat_template_kwargs",
        "chosen",
    )
    for _ in range(20_000):
        turns: list = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        odd = anything(draw, 3)
        turns.insert(draw.randrange(1, 3), odd if draw.random() < 0.5 else {"role": "assistant", "content": odd})
        record = {draw.choice(names): anything(draw, 3) for _ in range(draw.randrange(3))}
        record[draw.choice(("messages", "conversations", "other"))] = turns
        try:
            found = read(record, key="messages")
            read_ones += found is not None
        except Unreadable:
            continue
    assert 300 < read_ones < 19_700, read_ones


# -- through prepare -----------------------------------------------------------------------------------------------


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
    values = {"format": "chat", "tokenizer": str(folder / "tok"), "eval_fraction": 0.0, "seq_len": 256, "source": [str(source)]} | fields
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
    record, source = {"instruction": "How deep?", "input": "", "output": "Very.", "id": 7}, folder / "alpaca.json"
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
    rows = [{"messages": PLAIN, "tools": '[{"name": "f"}]', "rating": 5}, {"messages": PLAIN, "tools": None, "rating": 1}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "talk.parquet")
    facts = made(settings(folder, [], source=[str(folder / "talk.parquet")]))
    reader = IndexedReader(folder / "data/train")
    assert '[{"name": "f"}]<|im_start|>user' in tokenizer.decode(np.array(reader.read(0, reader.tokens)))
    assert (facts["unread"], facts["notes"]) == ({"rating": 2}, {})


def test_bad_content_is_refused_with_its_line_and_never_trained_on(folder):
    records = [{"messages": PLAIN}, {"messages": [ASK, {"role": "assistant", "content": {"answer": "calm"}}]}, {"messages": PLAIN}]
    with pytest.raises(UserError, match=r"talk\.jsonl line 2: message 1 \(assistant\): its content is an object, not text"):
        made(settings(folder, records))
    facts = made(settings(folder, records), skip_bad=True)
    assert (facts["bad_records"], facts["splits"]["train"]["documents"]) == (1, 2)
    with pytest.raises(UserError, match=r"line 1: it is a preference pair[\s\S]*not supported yet[\s\S]*try: +conversations with the chosen answer alone"):
        made(settings(folder, [{"chosen": "a", "rejected": "b"}]), overwrite=True)


def test_a_tool_call_that_is_not_rendered_is_refused_with_its_line(folder):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    with pytest.raises(
        UserError, match=r"line 2: message 1 \(assistant\) has tool calls that the chat template of data\.tokenizer=\S*/tok does not render"
    ) as caught:
        made(settings(folder, [{"messages": PLAIN}, {"messages": [ASK, call]}]))
    assert ".partial" not in str(caught.value)


def test_samples_of_a_conversation_are_on_one_side_and_no_duplicates_of_one_another(folder, tokenizer):  # noqa: F811
    talks = [{"messages": [ASK, ANSWER, {"role": "user", "content": f"{number}?"}, ANSWER]} for number in range(40)]
    facts = made(settings(thinking(folder, tokenizer), talks + talks[:3], eval_fraction=0.3, deduplicate=True))
    seen = {}
    for split in ("train", "eval"):
        reader = IndexedReader(folder / "data" / split)
        ends = np.cumsum(reader.sizes)
        texts = [tokenizer.decode(np.array(reader.read(end - size, end))) for end, size in zip(ends, reader.sizes, strict=True)]
        assert len(texts) % 2 == 0
        for short, long in zip(texts[::2], texts[1::2], strict=True):
            assert long.count("assistant") == 2 > short.count("assistant")
            seen[long] = split
    assert len(seen) == 40
    assert set(seen.values()) == {"train", "eval"}
    assert sum(split["documents"] for split in facts["splits"].values()) == 80
    assert (facts["conversations"], facts["duplicates"]) == (43, 6)
    words = "conversations with a sample for each answer, since the template renders earlier answers otherwise"
    assert facts["notes"] == {words: [43, f"{folder}/talk.jsonl line 1"]}
    assert f"43 {words}, first {folder}/talk.jsonl line 1" in statistics.table(folder / "data")
    with pytest.raises(UserError, match=r"data\.chat_turns=last: .*prepared with all"):
        made(settings(folder, talks + talks[:3], eval_fraction=0.3, deduplicate=True, chat_turns="last"))


def test_the_summary_says_what_was_read_and_where_answers_end(folder):
    made(settings(folder, [{"messages": PLAIN, "id": 1}, {"messages": [ASK, {"role": "assistant", "content": ""}]}, {"prompt": "a", "completion": "b"}]))
    lines = [line.strip() for line in statistics.table(folder / "data").splitlines()]
    assert "records    messages of role and content: 2" in lines
    assert "records    prompt and completion: 1" in lines
    assert "fields that are not read: id (1)" in lines
    assert f"1 conversations with an empty answer, which learn its end alone, first {folder}/talk.jsonl line 2" in lines
    assert "answers end with <|im_end|>; the tokenizer's end of text is <|endoftext|>: exports end a text with either" in lines


# -- nothing to learn ----------------------------------------------------------------------------------------------

LONG = {"messages": [{"role": "user", "content": "word " * 80}, ANSWER]}


def test_conversations_whose_answers_are_cut_off_are_left_out_and_counted(folder):
    facts = made(settings(folder, [LONG, {"messages": PLAIN}, LONG, {"messages": [ASK, {**ANSWER, "weight": 0}]}], seq_len=64))
    train = facts["splits"]["train"]
    assert facts["notes"] == {
        "conversations without an answer within data.seq_len tokens, left out": [2, f"{folder}/talk.jsonl line 1"],
        "conversations none of whose answers is to be learnt, left out": [1, f"{folder}/talk.jsonl line 4"],
    }
    assert (train["documents"], train["loss_tokens"], train["kept_tokens"]) == (1, len("Very.") + 1, train["tokens"])
    share = train["loss_tokens"] / train["tokens"]
    assert f"{share:.1%} of the tokens carry loss" in statistics.table(folder / "data")
    with pytest.raises(UserError, match=r"data\.seq_len=64: no conversation to train on has an answer that begins within so many tokens"):
        made(settings(folder, [LONG] * 8, seq_len=64), overwrite=True)
    with pytest.raises(UserError, match=r"^data\.source=.*: no answer to train on is to be learnt, by their weight, train or loss of 0"):
        made(settings(folder, [{"messages": [ASK, {**ANSWER, "weight": 0}]}] * 8, seq_len=64), overwrite=True)


def test_targets_are_counted_after_cutting(folder):
    """An answer of which half is left: 6 tokens of its 11."""
    head = "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"
    tokens = 3 + len(head.replace("<|im_start|>", "").replace("<|im_end|>", ""))
    facts = made(settings(folder, [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "0123456789"}]}], seq_len=tokens + 5))
    train = facts["splits"]["train"]
    assert (train["cut"], train["loss_tokens"], train["kept_tokens"]) == (1, 6, tokens + 6)


@pytest.fixture
def without_targets(folder) -> Path:
    """As an earlier version prepared it: its figures count targets that are cut off, and some rows have none."""
    facts = made(settings(folder, [{"messages": [{"role": "user", "content": f"{n}?"}, ANSWER]} for n in range(40)], seq_len=64, eval_fraction=0.3))
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
    blend.check_train_rows(opened, seq_len=64)
    blank(without_targets, "train", share=1)
    with pytest.raises(UserError, match=r"data\.path=.*no token of .* carries loss: every answer is cut off"):
        blend.check_train_rows(opened, seq_len=64)
    blend.check_eval_rows(opened, seq_len=64, field="train.eval_every", value=2)
    blank(without_targets, "eval", share=1)
    with pytest.raises(UserError, match=r"train\.eval_every=2: no token of the held-out part"):
        blend.check_eval_rows(opened, seq_len=64, field="train.eval_every", value=2)


def test_steps_without_targets_have_no_loss_and_are_counted(without_targets, tmp_path):
    blank(without_targets, "train", share=0.8)
    options = {"data__seq_len": 64, "batch__global_batch_size": 1, "train__steps": 12, "train__eval_every": 12}
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
    ended = runs.on_ranks(1, runs.arguments(tmp_path / "run", without_targets, data__seq_len=64, train__eval_every=1, train__eval_rows=1))
    assert "none of the held-out rows" in runs.four_parts(ended.err, "train.eval_rows")


def test_the_records_that_the_documentation_shows_are_read():
    (block,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), flags=re.DOTALL)
    found = [parsed(json.loads(line)) for line in block.splitlines()]
    assert [each.form for each in found] == [
        "messages of role and content",
        "conversations of from and value",
        "prompt and completion",
        "instruction and output",
    ]
    assert all(each.trains == [False, True] and not each.unread for each in found)
