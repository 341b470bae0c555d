"""Reads conversations in all usual formats into lists of messages with text.

    messages            [{role, content}, ...] (OpenAI); also tools, system, chat_template_kwargs
    conversations       [{from, value}, ...] (ShareGPT), or messages under this name
    prompt, completion  two texts, or two lists of messages; loss on the completion only
    instruction, output (Alpaca), optionally input and history, which become part of the question

Each field is read, refused, or listed in `unread`. Content is text; of lists of parts, the
text parts are joined.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

DEFAULT_KEY = "messages"
_BESIDE = ("tools", "system", "chat_template_kwargs")
_FORMS = {
    "conversations": ("conversations",),
    "prompt and completion": ("prompt", "completion"),
    "instruction and output": ("instruction", "output"),
}
_OPTIONAL = {"instruction and output": ("input", "history")}
_PAIR = ("chosen", "rejected")
_LOSS_KEYS = ("weight", "train", "loss")
"""Keys of a message; 0 or false: an answer without loss."""

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_RESERVED = (
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "conversations",
    "return_assistant_tokens_mask",
)
NOT_YET = "it is a preference pair (chosen, rejected), and preference pairs are not supported yet"


class Unreadable(ValueError):
    """A record that is no valid conversation. `instead`: what to try, if there is special advice."""

    def __init__(self, problem: str, *, instead: str) -> None:
        super().__init__(problem)
        self.instead = instead


@dataclass(frozen=True)
class Conversation:
    """Input of a chat template, and the answers that are targets."""

    messages: list[Message]
    """role, content (text; may be missing if there are tool_calls), and other keys of the record."""
    trains: list[bool]
    """For each message whether it is an answer to train on."""
    tools: list[dict[str, Any]] | None
    options: dict[str, Any]
    """chat_template_kwargs."""
    form: str
    unread: list[str]
    """Fields of the record that are not used."""
    content: bytes
    """Identity, for the split and for deduplication."""

    @property
    def text(self) -> str:
        return "\n".join(message.get("content") or "" for message in self.messages)


def fields(key: str) -> set[str]:
    """All fields of a record that may be used, with `data.messages_key=key`."""
    forms = (
        [name for names in (*_FORMS.values(), *_OPTIONAL.values()) for name in names]
        if key == DEFAULT_KEY
        else []
    )
    return {key, *forms, *_PAIR, *_BESIDE}


def has_form(columns: Iterable[str], *, key: str) -> bool:
    """Whether records with these fields are in a known format (also preference pairs, which are refused)."""
    present = set(columns)
    return key in present or (
        key == DEFAULT_KEY and any(present.issuperset(names) for names in (*_FORMS.values(), _PAIR))
    )


def read(record: dict[str, Any], *, key: str) -> Conversation | None:
    """The conversation in a record; None if it has no messages. Raises Unreadable."""
    present = {name: value for name, value in record.items() if value is not None}
    if set(_PAIR) <= present.keys():
        raise Unreadable(
            NOT_YET, instead="conversations with the chosen answer alone: messages, or prompt and completion"
        )
    form = (
        next((name for name, names in _FORMS.items() if present.keys() >= set(names)), None)
        if key == DEFAULT_KEY and key not in present
        else key
    )
    if form is None or (form == key and key not in present):
        shown = ", ".join(map(repr, list(record)[:8])) or "none"
        raise Unreadable(f"its field {key!r} is missing or null (its fields: {shown})", instead="")
    messages, first = _messages(present, form=form)
    if not messages:
        return None
    first_one: Any = messages[0]
    before, shape = (
        len(messages),
        "from and value" if isinstance(first_one, dict) and "from" in first_one else "role and content",
    )
    messages = _with_system(messages, present.get("system"))
    first += len(messages) - before
    tools, options = _tools(present.get("tools")), _options(present.get("chat_template_kwargs"))
    checked = [_checked(number, message) for number, message in enumerate(messages)]
    trains = [_trains(number, message) and number >= first for number, message in enumerate(checked)]
    _check_roles(checked)
    used = {key, *_FORMS.get(form, ()), *_OPTIONAL.get(form, ()), *_BESIDE}
    return Conversation(
        messages=[
            {name: value for name, value in message.items() if name not in _LOSS_KEYS} for message in checked
        ],
        trains=trains,
        tools=tools,
        options=options,
        form=form if form in _OPTIONAL or form == "prompt and completion" else f"{form} of {shape}",
        unread=sorted(name for name in present if name not in used),
        content=_content(checked, tools=tools, options=options),
    )


def _messages(record: dict[str, Any], *, form: str) -> tuple[list[Any], int]:
    """(messages of a record, index of the first one that may be a target)."""
    if form == "prompt and completion":
        parts = []
        for name, role in (("prompt", "user"), ("completion", "assistant")):
            value = record[name]
            if not isinstance(value, str | list):
                raise _unreadable(f"its field {name!r} is {kind(value)}, neither text nor a list of messages")
            parts.append([{"role": role, "content": value}] if isinstance(value, str) else value)
        return [*parts[0], *parts[1]], len(parts[0])
    if form == "instruction and output":
        for name in ("instruction", "input", "output"):
            if not isinstance(record.get(name, ""), str):
                raise _unreadable(f"its field {name!r} is {kind(record[name])}, not text")
        question = "\n\n".join(text for text in (record["instruction"], record.get("input", "")) if text)
        turns = [*_history(record.get("history", [])), (question, record["output"])]
        return [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ], 0
    value = record[form]
    if not isinstance(value, list):
        raise _unreadable(f"its field {form!r} is {kind(value)}, no list of messages")
    return value, 0


def _history(value: Any) -> list[tuple[str, str]]:
    if not isinstance(value, list) or not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in value
    ):
        raise _unreadable("its field 'history' is no list of [question, answer]")
    return [(question, answer) for question, answer in value]


def _with_system(messages: list[Any], system: Any) -> list[Any]:
    """The messages, with the record's field `system` as the first one."""
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        raise _unreadable(f"its field 'system' is {kind(system)}, not text")
    first = messages[0] if isinstance(messages[0], dict) else {}
    if (first.get("role") or first.get("from")) in ("system", "developer"):
        raise _unreadable("it has a field 'system', and its messages begin with a system message too")
    return [{"role": "system", "content": system}, *messages]


def _checked(number: int, message: Any) -> Message:
    """A message with role and text, without null fields (Parquet has every field in every row)."""
    if not isinstance(message, dict):
        raise _unreadable(f"message {number} is {kind(message)}, no object with a role")
    message = {name: value for name, value in message.items() if value is not None}
    if "role" not in message and isinstance(message.get("from"), str):
        message = _from_sharegpt(number, message)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise _unreadable(f"message {number} is no object with a role")
    calls = message.get("tool_calls")
    if calls is not None:
        _check_calls(calls, place=f"message {number} ({role})")
    content = _text(message.get("content"), place=f"message {number} ({role})")
    if content is None:
        if not calls:
            raise _unreadable(
                f"message {number} ({role}) has no content"
                + (" and no tool_calls" if role == "assistant" else "")
            )
        return message
    return {**message, "content": content}


def _from_sharegpt(number: int, message: Message) -> Message:
    source, value = message["from"], message.get("value")
    if source not in _ROLES:
        raise _unreadable(f"message {number} is from {source!r}, which is none of {', '.join(_ROLES)}")
    rest = {name: field for name, field in message.items() if name not in ("from", "value")}
    if source != "function_call":
        return {"role": _ROLES[source], "content": value, **rest}
    try:
        call: Any = json.loads(value) if isinstance(value, str) else value
        calls = [
            {"type": "function", "function": {"name": one["name"], "arguments": one["arguments"]}}
            for one in (call if isinstance(call, list) else [call])
        ]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _unreadable(
            f"message {number} is a function_call whose value is no JSON object with name and arguments"
        ) from None
    return {"role": "assistant", "tool_calls": calls, **rest}


def _check_calls(calls: Any, *, place: str) -> None:
    if not isinstance(calls, list):
        raise _unreadable(f"{place}: its tool_calls are {kind(calls)}, no list")
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _unreadable(f"{place}: a tool call has no function with a name")


def _text(content: Any, *, place: str) -> str | None:
    """Content as text: itself, or its joined text parts; None if there is none."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _unreadable(f"{place}: its content is {kind(content)}, not text")
    texts = []
    for part in content:
        if not isinstance(part, dict):
            raise _unreadable(
                f"{place}: its content is a list with {kind(part)} in it; allowed are parts of type text"
            )
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise _unreadable(
                f"{place}: its content has a part of type {part.get('type')!r}, and only text is supported"
            )
        texts.append(part["text"])
    return "".join(texts) if texts else None


def _trains(number: int, message: Message) -> bool:
    """Whether a message is a target: true for answers, unless weight, train or loss is 0 or false."""
    answer = message["role"] == "assistant"
    flags = {name: message[name] for name in _LOSS_KEYS if name in message}
    for name, value in flags.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise _unreadable(
                f"message {number} ({message['role']}) has {name} {str(value)[:40]}; "
                "only 0, 1, true and false are supported"
            )
        if value and not answer:
            raise _unreadable(
                f"message {number} ({message['role']}) asks for loss by {name}, "
                "which only answers of the assistant can have"
            )
    if len({bool(value) for value in flags.values()}) > 1:
        raise _unreadable(
            f"message {number} ({message['role']}): {' and '.join(flags)} contradict each other"
        )
    return answer and all(flags.values())


def _check_roles(messages: Sequence[Message]) -> None:
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise _unreadable("it has no assistant message, so nothing to learn")
    if roles[0] == "assistant":
        raise _unreadable("it begins with the assistant's answer")


def _tools(value: Any) -> list[dict[str, Any]] | None:
    value = _from_json(value, name="tools")
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise _unreadable(f"its field 'tools' is {kind(value)}, no list of objects")
    return value


def _options(value: Any) -> dict[str, Any]:
    value = _from_json(value, name="chat_template_kwargs")
    if not value:
        return {}
    if not isinstance(value, dict):
        raise _unreadable(f"its field 'chat_template_kwargs' is {kind(value)}, no object")
    if own := [name for name in value if name in _RESERVED]:
        raise _unreadable(f"its field 'chat_template_kwargs' sets {own[0]!r}, which a record must not set")
    return {name: option for name, option in value.items() if option is not None}


def _from_json(value: Any, *, name: str) -> Any:
    """`value`, parsed if it is JSON text: Parquet columns may hold nested values as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        raise _unreadable(f"its field {name!r} is text that is not JSON") from None


def _content(messages: list[Message], *, tools: Any, options: dict[str, Any]) -> bytes:
    beside = {**({"tools": tools} if tools else {}), **({"chat_template_kwargs": options} if options else {})}
    try:
        return json.dumps(
            {"messages": messages, **beside} if beside else messages, sort_keys=True, ensure_ascii=False
        ).encode()
    except (UnicodeEncodeError, TypeError, RecursionError) as error:
        raise _unreadable(f"it holds what no text can ({error})") from None


def _unreadable(problem: str) -> Unreadable:
    return Unreadable(problem, instead="the record corrected")


def kind(value: Any) -> str:
    """The type of a JSON value as text."""
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
        type(None): "null",
    }
    return names.get(type(value), f"a {type(value).__name__}")
