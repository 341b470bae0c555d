"""Conversations to tokens, and which of them carry loss: what the assistant says, its end-of-turn token included.

    [{role, content}, ...] -> the tokenizer's chat template -> text and the assistant's spans in it -> ids, loss mask

The spans are the template's own where it marks them with `{% generation %}`. Else each is the difference of two renderings:
from the end of "the messages before, and the header of an answer" to the end of "the messages up to this answer".
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from hybridtrain.types import UserError, refusal

PLAIN = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""For a tokenizer without a template: a line that names the role, then the content; answers end with the end-of-text token."""
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")

Conversation = list[dict[str, Any]]
Span = tuple[int, int]


def set_template(tokenizer: Any, *, choice: str) -> None:
    """Give the tokenizer the template of `data.chat_template`: its own, or PLAIN. Raises UserError where it has none of its own."""
    if choice == "plain":
        if tokenizer.eos_token is None:
            raise refusal(
                "data.chat_template",
                choice,
                "the tokenizer has no end-of-text token to end an answer with",
                allowed="a tokenizer that has one",
                instead="another data.tokenizer",
            )
        tokenizer.chat_template = PLAIN
    _template(tokenizer)


def problem(conversation: Any) -> str | None:
    """What is wrong with a record that should be a conversation; None if it can be encoded."""
    if not isinstance(conversation, list) or not conversation:
        return "it is no list of messages"
    for number, message in enumerate(conversation):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f"message {number} is no object with a role"
        if not isinstance(message.get("content"), str) and message["role"] != "assistant":
            return f"message {number} ({message['role']}) has no content"
    roles = [message["role"] for message in conversation]
    if "assistant" not in roles:
        return "it has no assistant message, so nothing to learn"
    return "it begins with the assistant's answer" if roles[0] == "assistant" else None


def encode(conversations: list[Conversation], *, tokenizer: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids int32 (n,), loss mask uint8 (n,)) of each conversation; 1 = this token, as a target, carries loss.

    Raises UserError for a tokenizer without a chat template or without character offsets, and for a template that fails on a
    conversation or does not tell where an answer starts and ends.
    """
    template = _template(tokenizer)
    if not tokenizer.is_fast:
        raise refusal(
            "data.tokenizer",
            tokenizer.name_or_path,
            "it is written in Python and does not tell which characters a token stands for",
            allowed="for conversations, tokenizers with a tokenizer.json",
            instead="a tokenizer folder with tokenizer.json",
        )
    spans = _marked_spans if _MARKED.search(template) else _difference_spans
    given = [[{key: value for key, value in message.items() if value is not None} for message in conversation] for conversation in conversations]
    rendered = [spans(conversation, tokenizer=tokenizer, template=template) for conversation in given]
    if not rendered:
        return []
    encoded = tokenizer([text for text, _ in rendered], add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], rendered, strict=True)
    return [(np.array(ids, dtype=np.int32), _mask(offsets, spans=found)) for ids, offsets, (_, found) in pairs]


def _template(tokenizer: Any) -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise refusal(
            "data.tokenizer",
            tokenizer.name_or_path,
            "it has no chat template",
            allowed="for conversations, a tokenizer with a chat template",
            instead="the tokenizer of an instruction-tuned model, or data.chat_template=plain",
        ) from error


def _mask(offsets: list[Span], *, spans: list[Span]) -> np.ndarray:
    """1 for tokens with a character inside a span. A token of spaces may have no width: it stands where the spaces end."""
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    mask = np.zeros(len(starts), dtype=np.uint8)
    for start, end in spans:
        mask[(ends > start) & ((starts < end) | (ends <= end))] = 1
    return mask


def _marked_spans(conversation: Conversation, *, tokenizer: Any, template: str) -> tuple[str, list[Span]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered: Any = render_jinja_template([conversation], chat_template=template, return_assistant_tokens_mask=True, **tokenizer.special_tokens_map)
    except Exception as error:  # whatever a template of any maker raises
        raise _failed(tokenizer, conversation, error) from error
    (text,), (spans,) = rendered
    return text, spans


def _difference_spans(conversation: Conversation, *, tokenizer: Any, template: str) -> tuple[str, list[Span]]:
    def render(messages: Conversation, *, header: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=header)
        except Exception as error:
            raise _failed(tokenizer, conversation, error) from error

    whole = render(conversation, header=False)
    special = tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    spans = []
    for number, message in enumerate(conversation):
        if message["role"] == "assistant":
            before, through = render(conversation[:number], header=True), render(conversation[: number + 1], header=False)
            if not (through.startswith(before) and whole.startswith(through)):
                raise _shifting(tokenizer, number)
            end = through.rstrip()  # the model stops at its end-of-turn token; the line break after it is the template's
            spans.append((len(before), len(end) if end.endswith(special) else len(through)))
    return whole, spans


def _failed(tokenizer: Any, conversation: Conversation, error: Exception) -> UserError:
    roles = ", ".join(message["role"] for message in conversation[:6])
    return refusal(
        "data.tokenizer",
        tokenizer.name_or_path,
        f"its chat template fails on a conversation of {roles}{', ...' if len(conversation) > 6 else ''}: {type(error).__name__}: {error}",
        allowed="conversations that the template renders",
        instead="a tokenizer whose chat template knows these roles, or data.chat_template=plain",
    )


def _shifting(tokenizer: Any, number: int) -> UserError:
    return refusal(
        "data.tokenizer",
        tokenizer.name_or_path,
        f"its chat template renders message {number} (assistant) otherwise when more messages follow, so there is no telling which tokens are the answer",
        allowed="templates that mark answers with {% generation %}, or whose text only grows with the conversation",
        instead="conversations with one answer each, a template with {% generation %}, or data.chat_template=plain",
    )
