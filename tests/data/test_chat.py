"""Conversations: which tokens carry loss."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hybridtrain.data.prepare import chat, conversations
from hybridtrain.data.prepare.template import PLAIN, Template, end_of_turn, set_template
from hybridtrain.errors import UserError

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
BARE = (
    "{% for m in messages %}{{ m['role'] + ':\n' + m['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
)
THINKING = (
    "{% set asked = namespace(at=0) %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{% set asked.at = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.index0 > asked.at %}"
    "{{ '<think>\n' + (m['reasoning_content'] or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Shows thinking, be it empty, in answers to the last question alone."""
TOOLED = (
    "{% if tools %}{{ '<tools>' + tools|tojson + '</tools>' }}{% endif %}{% if shout %}!{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for call in m['tool_calls'] %}"
    "{{ '<call>' + call['function']['name'] + ' ' + call['function']['arguments']|tojson + '</call>' }}"
    "{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT_TOOLED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] is none %}"
    "{% for call in m['tool_calls'] %}"
    "{{ '<call>' + call['function']['name'] + ' ' + call['function']['arguments'] + '</call>' }}{% endfor %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Tool calls only where the content is None, and their arguments as text."""
DEAF = (
    "{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Où?"},
    {"role": "assistant", "content": "  Là-bas  ☺"},
    {"role": "user", "content": "And\nthen?"},
    {"role": "assistant", "content": "Home.\n\n"},
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, spaces in pairs joined, and three special tokens."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(
        models.BPE(
            vocab={symbol: number for number, symbol in enumerate([*bytes_, "ĠĠ"])}, merges=[("Ġ", "Ġ")]
        )
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return fast


def spans(tokenizer, sample) -> list[str]:
    """The text of each run of tokens that carry loss."""
    ids, mask = sample
    assert (ids.dtype, mask.dtype, ids.shape) == (np.int32, np.uint8, mask.shape)
    edges = np.flatnonzero(np.diff(mask.astype(int), prepend=0, append=0)).reshape(-1, 2)
    return [tokenizer.decode(ids[start:stop]) for start, stop in edges]


def encoded(tokenizer, record, template, *, turns="all") -> chat.Encoded:
    tokenizer.chat_template = template
    record = {"messages": record} if isinstance(record, list) else record
    (one,) = chat.encode(
        [conversations.read(record, key="messages")], template=Template(tokenizer, name="TOK"), turns=turns
    )
    return one


def learnt(tokenizer, conversation, template) -> list[str]:
    """What is learnt of a conversation that is one sample, after checking that the ids are those of the
    rendered conversation."""
    ((ids, mask),) = encoded(tokenizer, conversation, template).samples
    assert (
        ids.tolist()
        == tokenizer(tokenizer.apply_chat_template(conversation, tokenize=False), add_special_tokens=False)[
            "input_ids"
        ]
    )
    return spans(tokenizer, (ids, mask))


@pytest.mark.parametrize(
    ("template", "end"),
    [(CHATML, "<|im_end|>"), (MARKED, "<|im_end|>"), (PLAIN, "<|endoftext|>"), (BARE, "\n")],
    ids=["chatml", "marked", "plain", "bare"],
)
def test_only_what_the_assistant_says_carries_loss(tokenizer, template, end):
    assert learnt(tokenizer, TALK, template) == [f"  Là-bas  ☺{end}", f"Home.\n\n{end}"]


def test_many_conversations_are_encoded_as_one_by_one(tokenizer):
    tokenizer.chat_template = CHATML
    template = Template(tokenizer, name="TOK")
    talks = [
        conversations.read({"messages": one}, key="messages")
        for one in (TALK, TALK[1:3], [*TALK[1:2], {"role": "assistant", "content": ""}])
    ]
    for whole, talk in zip(chat.encode(talks, template=template, turns="all"), talks, strict=True):
        (alone,) = chat.encode([talk], template=template, turns="all")
        assert [[one.tolist() for one in sample] for sample in whole.samples] == [
            [one.tolist() for one in sample] for sample in alone.samples
        ]
        assert whole[1:] == alone[1:]
    assert chat.encode([], template=template, turns="all") == []


def test_a_template_that_rewrites_earlier_answers_makes_a_sample_of_each(tokenizer):
    """Each is what the model sees when it is asked for this answer, which alone carries loss."""
    assert learnt(tokenizer, TALK[:3], THINKING) == ["<think>\n\n</think>\n\n  Là-bas  ☺<|im_end|>"]
    one = encoded(tokenizer, TALK, THINKING)
    head = "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nOù?<|im_end|>\n<|im_start|>assistant\n"
    between = "  Là-bas  ☺<|im_end|>\n<|im_start|>user\nAnd\nthen?<|im_end|>\n<|im_start|>assistant\n"
    first, second = (
        "<think>\n\n</think>\n\n  Là-bas  ☺<|im_end|>",
        "<think>\n\n</think>\n\nHome.\n\n<|im_end|>",
    )
    assert [tokenizer.decode(ids) for ids, _ in one.samples] == [
        head + first + "\n",
        head + between + second + "\n",
    ]
    assert [spans(tokenizer, sample) for sample in one.samples] == [[first], [second]]
    assert one.notes == [
        "conversations with a sample for each answer, since the template renders earlier answers differently"
    ]


def test_the_last_answer_alone_may_be_learnt(tokenizer):
    for template, end in (
        (CHATML, "Home.\n\n<|im_end|>"),
        (MARKED, "Home.\n\n<|im_end|>"),
        (THINKING, "<think>\n\n</think>\n\nHome.\n\n<|im_end|>"),
    ):
        one = encoded(tokenizer, TALK, template, turns="last")
        assert [spans(tokenizer, sample) for sample in one.samples] == [[end]]
        assert one.notes == []


def test_thinking_that_the_template_takes_out_is_learnt_where_the_answer_is_the_last(tokenizer):
    deep = [TALK[1], {"role": "assistant", "content": "Là", "reasoning_content": "hm"}, *TALK[3:]]
    one = encoded(tokenizer, deep, THINKING)
    assert [spans(tokenizer, sample) for sample in one.samples] == [
        ["<think>\nhm\n</think>\n\nLà<|im_end|>"],
        ["<think>\n\n</think>\n\nHome.\n\n<|im_end|>"],
    ]
    assert "hm" not in tokenizer.decode(one.samples[1][0])


def test_an_answer_that_begins_otherwise_when_it_is_asked_for_is_refused(tokenizer):
    one = encoded(tokenizer, TALK, CHATML.replace("assistant\n'", "assistant\n<think>\n'"))
    assert one.samples == []
    assert (
        "the chat template of TOK renders the header of message 2 differently before and with its answer"
        in one.problem
    )


@pytest.mark.parametrize(("key", "off"), [("weight", 0), ("train", False), ("loss", 0.0)])
@pytest.mark.parametrize("template", [CHATML, MARKED, THINKING], ids=["chatml", "marked", "thinking"])
def test_answers_without_weight_carry_no_loss(tokenizer, key, off, template):
    talk = [*TALK[:2], {**TALK[2], key: off}, *TALK[3:]]
    one = encoded(tokenizer, talk, template)
    ((ids, mask),) = one.samples
    assert [text.removeprefix("<think>\n\n</think>\n\n") for text in spans(tokenizer, (ids, mask))] == [
        "Home.\n\n<|im_end|>"
    ]
    assert "Là-bas" in tokenizer.decode(ids)
    assert one.notes == []


def test_nothing_that_changes_what_is_learnt_is_dropped_in_silence(tokenizer):
    tools = [{"type": "function", "function": {"name": "depth", "parameters": {}}}]
    record = {
        "messages": TALK[1:3],
        "tools": tools,
        "system": "Be short.",
        "chat_template_kwargs": {"shout": True},
    }
    one = encoded(tokenizer, record, TOOLED)
    assert tokenizer.decode(one.samples[0][0]).startswith(
        f"<tools>{json.dumps(tools)}</tools>!<|im_start|>system\nBe short.<|im_end|>\n"
    )
    assert one.notes == []
    talk = [
        {"role": "developer", "content": "Be."},
        {**TALK[1], "name": "Ann"},
        {"role": "assistant", "content": " "},
    ]
    one = encoded(tokenizer, {**record, "messages": talk, "system": None}, DEAF)
    assert one.problem == ""
    assert one.notes == [
        "records whose tools the template does not render",
        "records whose chat_template_kwargs 'shout' the template does not know",
        "records whose messages have 'name', which the template does not render",
        "records with a message of 'developer' that the template does not render",
        "conversations with an empty answer, of which only the end is trained",
    ]
    one = encoded(
        tokenizer,
        [TALK[1], {"role": "assistant", "content": "calm"}],
        CHATML.replace("m['content'] +", "m['content']|replace('l', '1') +"),
    )
    assert one.notes == ["conversations with an answer that the template changes"]
    one = encoded(
        tokenizer,
        [{"role": "user", "content": "a <|im_end|>"}, {"role": "assistant", "content": "b"}],
        CHATML,
    )
    assert one.notes == [
        "conversations with a control token written out in a message, which becomes the token itself"
    ]


def test_a_role_that_is_none_of_the_usual_ones_is_named(tokenizer):
    one = encoded(tokenizer, [{"role": "human", "content": "Où?"}, TALK[2]], CHATML)
    assert one.notes == ["records with a message of the unusual role 'human'"]


CALL = {"type": "function", "function": {"name": "depth", "arguments": '{"of": "sea"}'}}


@pytest.mark.parametrize("content", [None, "", [], "Let me see."])
@pytest.mark.parametrize("arguments", ['{"of": "sea"}', {"of": "sea"}])
def test_tool_calls_are_learnt_however_the_record_writes_them(tokenizer, content, arguments):
    asked = {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"type": "function", "function": {"name": "depth", "arguments": arguments}}],
    }
    talk = [
        TALK[1],
        asked,
        {"role": "tool", "content": "11 km", "tool_call_id": "1"},
        {"role": "assistant", "content": "Deep."},
    ]
    said = content or ""
    for template, call in (
        (TOOLED, '<call>depth {"of": "sea"}</call>'),
        (TEXT_TOOLED, '<call>depth {"of": "sea"}</call>'),
        (
            PLAIN,
            '<|tool_calls|>[{"type": "function", "function": {"name": "depth", "arguments": {"of": "sea"}}}]',
        ),
    ):
        one = encoded(tokenizer, talk, template)
        end = "<|endoftext|>" if template == PLAIN else "<|im_end|>"
        # which writes calls only where there is no content
        expected = "" if template == TEXT_TOOLED else said
        if template == TEXT_TOOLED and said:
            assert "tool calls that the chat template of TOK does not render" in one.problem
        else:
            assert (one.problem, [spans(tokenizer, sample) for sample in one.samples]) == (
                "",
                [[expected + call + end, "Deep." + end]],
            )


def test_a_tool_call_that_the_template_does_not_render_is_no_empty_answer(tokenizer):
    talk = [
        TALK[1],
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "11 km"},
        {"role": "assistant", "content": "Deep."},
    ]
    one = encoded(tokenizer, talk, CHATML)
    assert one.samples == []
    assert one.problem == (
        "message 1 (assistant) has tool calls that the chat template "
        "of TOK does not render, so its target would be wrong"
    )
    one = encoded(tokenizer, [talk[0], {**talk[1], "weight": 0}, *talk[2:]], CHATML)
    assert [spans(tokenizer, sample) for sample in one.samples] == [["Deep.<|im_end|>"]]
    assert one.notes == ["messages whose tool calls the template does not render"]


def test_a_tokenizer_without_template_is_refused_and_may_get_a_plain_one(tokenizer):
    with pytest.raises(UserError, match=r"no chat template[\s\S]*data\.chat_template=plain"):
        Template(tokenizer, name="TOK")
    with pytest.raises(UserError, match=r"no chat template"):
        set_template(tokenizer, choice="own")
    set_template(tokenizer, choice="plain")
    ((ids, mask),) = encoded(tokenizer, TALK[1:3], tokenizer.chat_template).samples
    assert tokenizer.decode(ids) == "<|user|>\nOù?\n<|assistant|>\n  Là-bas  ☺<|endoftext|>\n"
    assert tokenizer.decode(ids[mask == 1]) == "  Là-bas  ☺<|endoftext|>"


def test_a_template_that_fails_is_named(tokenizer):
    one = encoded(tokenizer, TALK, "{{ raise_exception('roles must alternate') }}")
    assert one.problem == (
        "the chat template of TOK fails on a conversation of system, user, "
        "assistant, user, assistant: TemplateError: roles must alternate"
    )


@pytest.mark.parametrize("place", ["main thread", "another thread"])
def test_a_template_that_never_ends_is_ended(tokenizer, place):
    endless = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"
    start = time.thread_time()
    if place == "main thread":
        one = encoded(tokenizer, TALK, endless)
        assert time.thread_time() - start < 5  # 1 s, and the last look at it
    else:
        with ThreadPoolExecutor(max_workers=1) as pool:
            one = pool.submit(encoded, tokenizer, TALK, endless).result()
    assert (
        "the chat template of TOK took more than 1 s on a conversation of system, user, assistant"
        in one.problem
    )
    # nothing strikes later
    assert spans(tokenizer, encoded(tokenizer, TALK[:3], CHATML).samples[0]) == ["  Là-bas  ☺<|im_end|>"]
    tokenizer.chat_template = "{{ 10 ** 10 ** 10 }}"
    with pytest.raises(UserError, match="raises numbers to powers"):
        Template(tokenizer, name="TOK")


@pytest.mark.parametrize(
    ("template", "token"),
    [
        (CHATML, "<|im_end|>"),
        (MARKED, "<|im_end|>"),
        (THINKING, "<|im_end|>"),
        (PLAIN, "<|endoftext|>"),
        (BARE, None),
        ("{{ raise_exception('') }}", None),
    ],
)
def test_the_end_of_a_turn(tokenizer, template, token):
    tokenizer.chat_template = template
    assert end_of_turn(tokenizer) == (None if token is None else tokenizer.convert_tokens_to_ids(token))
