"""Records of conversations: which forms are read, and what of them is refused."""

import json
import random
import re
from pathlib import Path

import pytest

from hybridtrain.data.prepare.conversations import NOT_YET, Conversation, Unreadable, read
from tests.data.talks import ANSWER, ASK, PLAIN

ROOT = Path(__file__).resolve().parents[2]


def parsed(record: dict) -> Conversation:
    found = read(record, key="messages")
    assert found is not None
    return found


FORMS = [
    ({"messages": PLAIN}, PLAIN, "messages of role and content"),
    (
        {"conversations": [{"from": "human", "value": "How deep?"}, {"from": "gpt", "value": "Very."}]},
        PLAIN,
        "conversations of from and value",
    ),
    ({"conversations": PLAIN}, PLAIN, "conversations of role and content"),
    ({"prompt": "How deep?", "completion": "Very."}, PLAIN, "prompt and completion"),
    ({"prompt": [ASK], "completion": [ANSWER]}, PLAIN, "prompt and completion"),
    ({"instruction": "How deep?", "input": "", "output": "Very."}, PLAIN, "instruction and output"),
    ({"instruction": "How deep?", "output": "Very."}, PLAIN, "instruction and output"),
    (
        {
            "instruction": "How deep?",
            "input": "The sea.",
            "output": "Very.",
            "history": [["Hi", "Ho"]],
            "system": "Be.",
        },
        [
            {"role": "system", "content": "Be."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Ho"},
            {"role": "user", "content": "How deep?\n\nThe sea."},
            ANSWER,
        ],
        "instruction and output",
    ),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "How "}, {"type": "text", "text": "deep?"}],
                },
                ANSWER,
            ]
        },
        PLAIN,
        "",
    ),
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
            {
                "role": "assistant",
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
            },
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
        # the same split, whatever the form
        assert found.content == json.dumps(PLAIN, sort_keys=True).encode()


def test_what_stands_beside_the_messages_is_read_or_named():
    tools = [{"type": "function", "function": {"name": "f"}}]
    for given in (tools, json.dumps(tools)):
        found = parsed(
            {
                "messages": PLAIN,
                "tools": given,
                "system": "Be.",
                "chat_template_kwargs": {"enable_thinking": False, "no": None},
                "id": 7,
                "no": None,
            }
        )
        assert (found.tools, found.options, found.unread) == (tools, {"enable_thinking": False}, ["id"])
        assert found.messages == [{"role": "system", "content": "Be."}, *PLAIN]
    assert parsed({"messages": PLAIN, "tools": tools}).content != parsed({"messages": PLAIN}).content
    assert read({"messages": []}, key="messages") is None


def test_loss_lies_on_the_completion_and_on_answers_with_weight():
    assert parsed({"prompt": PLAIN, "completion": [ANSWER]}).trains == [False, False, True]
    assert parsed({"prompt": PLAIN, "completion": [ANSWER], "system": "Be."}).trains == [
        False,
        False,
        False,
        True,
    ]
    assert parsed(
        {"messages": [ASK, {**ANSWER, "weight": 0}, {**ASK, "weight": None}, {**ANSWER, "train": True}]}
    ).trains == [False, False, False, True]
    assert parsed({"messages": [{**ASK, "weight": 0}, {**ANSWER, "weight": 1.0}]}).messages == PLAIN


BAD = [
    (
        [ASK, {"role": "assistant", "content": 42}],
        r"message 1 \(assistant\): its content is a number, not text",
    ),
    ([{"role": "user", "content": 4.5}, ANSWER], r"message 0 \(user\): its content is a number, not text"),
    (
        [ASK, {"role": "assistant", "content": {"answer": "calm"}}],
        r"message 1 \(assistant\): its content is an object, not text",
    ),
    (
        [ASK, {"role": "assistant", "content": True}],
        r"message 1 \(assistant\): its content is true or false, not text",
    ),
    (
        [{"role": "system", "content": ["a"]}, *PLAIN],
        r"message 0 \(system\): its content is a list with text in it; allowed are parts of type text",
    ),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER],
        r"message 0 \(user\): its content has a part of type 'image_url', and only text is supported",
    ),
    (
        [ASK, {"role": "assistant", "content": None}],
        r"message 1 \(assistant\) has no content and no tool_calls",
    ),
    (
        [ASK, {"role": "assistant", "content": []}],
        r"message 1 \(assistant\) has no content and no tool_calls",
    ),
    (
        [ASK, {"role": "assistant", "tool_calls": []}],
        r"message 1 \(assistant\) has no content and no tool_calls",
    ),
    ([{"role": "user"}, ANSWER], r"message 0 \(user\) has no content"),
    (
        [ASK, {"role": "assistant", "tool_calls": {"name": "f"}}],
        r"message 1 \(assistant\): its tool_calls are an object, no list",
    ),
    (
        [ASK, {"role": "assistant", "tool_calls": [{"id": "1"}]}],
        r"message 1 \(assistant\): a tool call has no function with a name",
    ),
    (
        [ASK, {**ANSWER, "weight": 0.5}],
        r"message 1 \(assistant\) has weight 0.5; only 0, 1, true and false are supported",
    ),
    (
        [{**ASK, "train": True}, ANSWER],
        r"message 0 \(user\) asks for loss by train, which only answers of the assistant can have",
    ),
    (
        [ASK, {**ANSWER, "weight": 1, "train": False}],
        r"message 1 \(assistant\): weight and train contradict each other",
    ),
    ([{"from": "narrator", "value": "x"}, ANSWER], r"message 0 is from 'narrator', which is none of human, "),
    (
        [ASK, {"from": "function_call", "value": "f(1)"}],
        r"message 1 is a function_call whose value is no JSON object with name and arguments",
    ),
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
        (
            {"prompt": 3, "completion": "x"},
            "its field 'prompt' is a number, neither text nor a list of messages",
        ),
        ({"instruction": "x", "output": ["y"]}, "its field 'output' is a list, not text"),
        (
            {"instruction": "x", "output": "y", "history": [["a"]]},
            r"its field 'history' is no list of \[question, answer\]",
        ),
        ({"messages": PLAIN, "tools": "not JSON"}, "its field 'tools' is text that is not JSON"),
        ({"messages": PLAIN, "tools": {"a": 1}}, "its field 'tools' is an object, no list of objects"),
        ({"messages": PLAIN, "system": 3}, "its field 'system' is a number, not text"),
        (
            {"messages": [{"role": "system", "content": "Be."}, *PLAIN], "system": "Be."},
            "it has a field 'system', and its messages begin with a system message too",
        ),
        (
            {"messages": PLAIN, "chat_template_kwargs": {"tools": []}},
            "its field 'chat_template_kwargs' sets 'tools', which a record must not set",
        ),
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
            return draw.choice(
                [
                    "user",
                    "assistant",
                    "human",
                    "gpt",
                    "text",
                    "function_call",
                    "",
                    "{",
                    "[]",
                    '{"name": "f", "arguments": {}}',
                    "\ud800",
                ]
            )
        case "number":
            return draw.choice([0, 1, -1, 0.5, float("nan"), 10**400])
        case "flag":
            return draw.random() < 0.5
        case "null":
            return None
        case "list":
            return [anything(draw, depth - 1) for _ in range(draw.randrange(3))]
    keys = (
        "role",
        "content",
        "from",
        "value",
        "tool_calls",
        "function",
        "name",
        "arguments",
        "type",
        "text",
        "weight",
        "train",
        "messages",
        "tools",
        "system",
    )
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
        turns.insert(
            draw.randrange(1, 3), odd if draw.random() < 0.5 else {"role": "assistant", "content": odd}
        )
        record = {draw.choice(names): anything(draw, 3) for _ in range(draw.randrange(3))}
        record[draw.choice(("messages", "conversations", "other"))] = turns
        try:
            found = read(record, key="messages")
            read_ones += found is not None
        except Unreadable:
            continue
    assert 300 < read_ones < 19_700, read_ones


def test_the_records_that_the_documentation_shows_are_read():
    block, *_ = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), flags=re.DOTALL)
    found = [parsed(json.loads(line)) for line in block.splitlines()]
    assert [each.form for each in found] == [
        "messages of role and content",
        "conversations of from and value",
        "prompt and completion",
        "instruction and output",
    ]
    assert all(each.trains == [False, True] and not each.unread for each in found)
