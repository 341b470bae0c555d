"""Conversations to token ids and loss masks.

Targets are the assistant's answers, including their end-of-turn token.

    Conversation -> chat template -> texts and the assistant's spans in them -> ids, loss mask

If the template marks spans with `{% generation %}`, these are used. Otherwise a span is the difference of
two renderings: from the end of "the messages before, and the header of an answer" to the end of "the
messages up to this answer".

A template may render an answer differently if messages follow (e.g. without its thinking). Such a
conversation becomes one sample per answer: the messages up to it, as the model sees them in inference, with
loss on this answer only. What the template does not render is counted in `Encoded.notes`; a conversation that
would get a wrong target is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from hybridtrain.data.prepare.conversations import Conversation, Message
from hybridtrain.data.prepare.template import Span, Template, Unrendered

Sample = tuple[np.ndarray, np.ndarray | None]
_NOT_RENDERED = ("tool_calls", "tool_call_id", "id")
"""Keys of messages that need not be rendered: tool calls are checked separately, the others
only link messages."""
_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_PROBE = "\u2063probe\u2063"


class Encoded(NamedTuple):
    """An encoded document."""

    samples: list[Sample]
    """int32 ids (n,) and, except for text, a uint8 loss mask (n,): 1: the token is a
    target; None: all are."""
    notes: list[str]
    """Peculiarities, to be counted."""
    problem: str
    """Why the document cannot be used; empty if it can."""
    instead: str
    """What to try if there is a problem."""

    @classmethod
    def text(cls, ids: np.ndarray) -> Encoded:
        """The result for a text."""
        return cls([(ids, None)], [], "", "")


@dataclass(frozen=True)
class _Sample:
    """A rendered text, and the answers in it that are targets."""

    messages: int
    """Number of messages of the conversation in it."""
    text: str
    spans: dict[int, Span]
    """Message number -> its span in the text."""


class _Incompatible(Exception):
    """The template cannot render this conversation correctly."""

    def __init__(self, problem: str, instead: str) -> None:
        super().__init__(problem)
        self.instead = instead


def encode(conversations: list[Conversation], *, template: Template, turns: str) -> list[Encoded]:
    """Each conversation as samples.

    `turns`: "all": train on every answer, "last": on the last of each conversation.
    """
    results: list[tuple[list[_Sample], list[str], str, str]] = []
    for conversation in conversations:
        try:
            samples, notes = _render(conversation, template=template, turns=turns)
            results.append((samples, notes, "", ""))
        except Unrendered as error:
            instead = (
                "a tokenizer whose chat template supports such conversations, or data.chat_template=plain"
            )
            results.append(([], [], str(error), instead))
        except _Incompatible as error:
            results.append(([], [], str(error), error.instead))
    texts = [sample.text for samples, *_ in results for sample in samples]
    tokens = (
        template.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        if texts
        else {"input_ids": [], "offset_mapping": []}
    )
    pairs = zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
    return [
        Encoded([_mask(*next(pairs), sample=sample) for sample in samples], notes, problem, instead)
        for samples, notes, problem, instead in results
    ]


def _mask(ids: list[int], offsets: list[Span], *, sample: _Sample) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask), the mask 1 for tokens with a character inside a span.

    Tokens of spaces may have width 0, at their end.
    """
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    mask = np.zeros(len(starts), dtype=np.uint8)
    for start, end in sample.spans.values():
        mask[(ends > start) & ((starts < end) | (ends <= end))] = 1
    return np.array(ids, dtype=np.int32), mask


# -- a conversation and its template -------------------------------------------------------------------------


def _render(conversation: Conversation, *, template: Template, turns: str) -> tuple[list[_Sample], list[str]]:
    """The samples of a conversation, and notes.

    Tool calls are written in the first format that the template renders.
    """
    trained = [number for number, trains in enumerate(conversation.trains) if trains]
    trained = trained[-1:] if turns == "last" else trained
    failed: Exception | None = None
    for messages in _ways(conversation.messages):
        one = _View(replace(conversation, messages=messages), template)
        try:
            samples = one.marked(trained) if template.marks else one.differences(trained)
        except (Unrendered, _Incompatible) as error:
            failed = failed or error
            continue
        dropped = [
            number
            for number, message in enumerate(messages)
            if message.get("tool_calls") and not one.shows_calls(samples, number)
        ]
        if any(number in trained for number in dropped):
            number = next(number for number in dropped if number in trained)
            words = (
                f"message {number} (assistant) has tool calls that the chat template "
                f"of {template.name} does not render, so its target would be wrong"
            )
            failed = _Incompatible(
                words, "a tokenizer whose chat template knows tool calls, or weight 0 on this message"
            )
            continue
        return samples, [
            *_notes(one, samples),
            *(["messages whose tool calls the template does not render"] if dropped else []),
        ]
    assert failed is not None
    raise failed


def _ways(messages: list[Message]) -> Iterator[list[Message]]:
    """The messages in the formats that templates expect: arguments of tool calls as an object or JSON, empty
    content "" or None.
    """
    if not any("tool_calls" in message for message in messages):
        yield messages
        return
    tried: list[list[Message]] = []
    for arguments in (_as_object, _as_json):
        for empty in ("", None):
            way = [_with_calls(message, arguments=arguments, empty=empty) for message in messages]
            if way not in tried:
                tried.append(way)
                yield way


def _with_calls(message: Message, *, arguments: Callable[[Any], Any], empty: str | None) -> Message:
    message = {
        "role": message["role"],
        "content": message.get("content") or empty,
        **{k: v for k, v in message.items() if k not in ("role", "content")},
    }
    if not message.get("tool_calls"):
        return {name: value for name, value in message.items() if name != "tool_calls"} | {
            "content": message["content"] or ""
        }
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        changed = {**function, "arguments": arguments(function.get("arguments", {}))}
        calls.append({**call, "function": changed} if "function" in call else changed)
    return {**message, "tool_calls": calls}


def _as_object(arguments: Any) -> Any:
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _as_json(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


@dataclass(frozen=True)
class _View:
    """A conversation with its template."""

    conversation: Conversation
    template: Template

    def text(self, messages: list[Message], *, header: bool) -> str:
        return self.template.render(
            messages, tools=self.conversation.tools, options=self.conversation.options, header=header
        )

    def marked(self, trained: list[int]) -> list[_Sample]:
        """One sample, with the spans that the template marks."""
        messages = self.conversation.messages
        text, spans = self.template.marked(
            messages, tools=self.conversation.tools, options=self.conversation.options
        )
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if len(spans) == len(answers):
            return [
                _Sample(
                    len(messages),
                    text,
                    {number: span for number, span in zip(answers, spans, strict=True) if number in trained},
                )
            ]
        if trained == answers:
            return [_Sample(len(messages), text, dict(enumerate(spans)))]
        words = (
            f"the chat template of {self.template.name} marks {len(spans)} spans "
            f"for {len(answers)} answers, so single answers cannot be left out"
        )
        raise _Incompatible(words, "data.chat_turns=all, and conversations without weights")

    def differences(self, trained: list[int]) -> list[_Sample]:
        """One sample if each rendering begins with the shorter one, else one per answer."""
        messages = self.conversation.messages
        whole = self.text(messages, header=False)
        alone = []
        for number in trained:
            before, through = (
                self.text(messages[:number], header=True),
                self.text(messages[: number + 1], header=False),
            )
            if not through.startswith(before):
                words = (
                    f"the chat template of {self.template.name} renders the header "
                    f"of message {number} differently before and with its answer"
                )
                raise _Incompatible(
                    f"{words}, so the tokens of the answer are not known",
                    "a template with {% generation %}, or data.chat_template=plain",
                )
            alone.append(_Sample(number + 1, through, {number: (len(before), self.template.end(through))}))
        if all(whole.startswith(sample.text) for sample in alone):
            return [
                _Sample(
                    len(messages),
                    whole,
                    {number: span for sample in alone for number, span in sample.spans.items()},
                )
            ]
        return alone

    def changes(
        self, samples: list[_Sample], change: Callable[[int, Message], Message], *, tools: bool
    ) -> bool:
        """Whether changing the messages (or removing the tools, with tools=False) changes any sample's text,
        or makes rendering fail.
        """
        one = self if tools else replace(self, conversation=replace(self.conversation, tools=None))
        try:
            return any(one._render_changed(sample, change) != sample.text for sample in samples)
        except Unrendered:
            return True

    def _render_changed(self, sample: _Sample, change: Callable[[int, Message], Message]) -> str:
        messages = [
            change(number, message)
            for number, message in enumerate(self.conversation.messages[: sample.messages])
        ]
        return self.text(messages, header=False)

    def shows_calls(self, samples: list[_Sample], number: int) -> bool:
        """Whether the tool calls of a message are rendered, in the sample that has it as a target,
        if there is one.
        """
        own = [sample for sample in samples if number in sample.spans] or [
            sample for sample in samples if sample.messages > number
        ]
        return self.changes(
            own,
            lambda place, message: _without(message, "tool_calls") if place == number else message,
            tools=True,
        )


def _dropping(key: str) -> Callable[[int, Message], Message]:
    return lambda _, message: _without(message, key)


def _probed(number: int) -> Callable[[int, Message], Message]:
    """A change that appends a unique string to one message."""
    return lambda place, message: (
        {**message, "content": message["content"] + _PROBE} if place == number else message
    )


def _without(message: Message, key: str) -> Message:
    return {name: value for name, value in message.items() if name != key}


# -- notes
# ---------------------------------------------------------------------------------------------------------


def _notes(view: _View, samples: list[_Sample]) -> list[str]:
    """Notes on what is not rendered, changed or unusual in a conversation."""
    conversation, template = view.conversation, view.template
    notes = []
    if len(samples) > 1:
        notes.append(
            "conversations with a sample for each answer, "
            "since the template renders earlier answers differently"
        )
    if conversation.tools and not view.changes(samples, lambda _, message: message, tools=False):
        notes.append("records whose tools the template does not render")
    notes += [
        f"records whose chat_template_kwargs {name!r} the template does not know"
        for name in conversation.options
        if name not in template.source
    ]
    keys = {key for message in conversation.messages for key in message} - {"role", "content", *_NOT_RENDERED}
    for key in sorted(keys):
        if not view.changes(samples, _dropping(key), tools=True):
            notes.append(f"records whose messages have {key!r}, which the template does not render")
    notes += sorted(
        {
            f"records with a message of {role!r} that the template does not render"
            for role in _unseen(view, samples)
        }
    )
    notes += sorted(
        {
            f"records with a message of the unusual role {message['role']!r}"
            for message in conversation.messages
            if message["role"] not in _ROLES
        }
    )
    notes += _of_answers(view, samples)
    if any(template.literal.search(message.get("content") or "") for message in conversation.messages):
        notes.append(
            "conversations with a control token written out in a message, which becomes the token itself"
        )
    return notes


def _unseen(view: _View, samples: list[_Sample]) -> Iterator[str]:
    """Roles of messages, other than answers, whose content is not rendered."""
    for number, message in enumerate(view.conversation.messages):
        content = (message.get("content") or "").strip()
        showing = [sample for sample in samples if sample.messages > number]
        if message["role"] == "assistant" or not content or any(content in sample.text for sample in showing):
            continue
        if not view.changes(showing, _probed(number), tools=True):
            yield message["role"]


def _of_answers(view: _View, samples: list[_Sample]) -> Iterator[str]:
    messages = view.conversation.messages
    if view.template.marks and not all(
        messages[number]["role"] == "assistant" for sample in samples for number in sample.spans
    ):
        return  # the template's spans are not answers
    contents = [(message.get("content") or "", "tool_calls" in message) for message in messages]
    trained = [
        (sample.text[start:end], *contents[number])
        for sample in samples
        for number, (start, end) in sample.spans.items()
    ]
    if any(not content.strip() and not calls for _, content, calls in trained):
        yield "conversations with an empty answer, of which only the end is trained"
    if any("".join(content.split()) not in "".join(text.split()) for text, content, _ in trained):
        yield "conversations with an answer that the template changes"
