"""Quotes values on the command line, so that Hydra's grammar does not turn text into numbers, lists or null.

Values of text options are quoted here and arrive as typed: `run.name=2026_11_26` keeps its underscores.
Not changed: values in quotes, `null`, calls such as choice(a,b), and interpolations (`${oc.env:TOKEN}`),
also inside a text.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
_CALL = re.compile(
    r"(choice|range|interval|glob|shuffle|sort|tag|extend_list|int|float|str|bool|json_str)\(.*\)", re.DOTALL
)
_NUMBER = re.compile(r"[+-]?[\d_]*\.?[\d_]*(e[+-]?\d+)?", re.IGNORECASE)
_REFERENCE = re.compile(r"\$\{\s*(oc\.\w+\s*:[^{}]*|[a-z_]+[.\[][\w.\[\]]+)\s*\}")
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_MOST_DIGITS = 40


def quoted(text: str) -> str:
    """`text` in single quotes for Hydra's grammar, in which backslashes escape only before a quote."""
    inner = re.sub(r"(\\*)'", lambda match: match[1] * 2 + "\\'", text)
    return "'" + re.sub(r"(\\+)$", lambda match: match[1] * 2, inner) + "'"


def literal(text: str) -> str:
    """`text` in quotes, without interpolation."""
    return quoted(escaped(text))


def escaped(text: str) -> str:
    """`text` with every `${` escaped for OmegaConf."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", text)


def split(text: str) -> list[str]:
    """`text` split at commas outside of quotes, brackets and interpolations; parts are stripped."""
    parts, start, index, open_ = [], 0, 0, []
    while index < len(text):
        character = text[index]
        if character in "'\"" and (match := _QUOTED.match(text, index)):
            index = match.end()
            continue
        if character in _CLOSING:
            open_.append(_CLOSING[character])
        elif open_ and character == open_[-1]:
            open_.pop()
        elif character == "," and not open_:
            parts.append(text[start:index].strip())
            start = index + 1
        index += 1
    return [*parts, text[start:].strip()]


def is_quoted(text: str) -> bool:
    """Whether `text` is one value in quotes."""
    return _QUOTED.fullmatch(text) is not None


def is_call(text: str) -> bool:
    """Whether `text` is a call of Hydra's grammar, such as choice(a,b)."""
    return _CALL.fullmatch(text.strip()) is not None


def alternatives(value: str) -> list[str] | None:
    """The values of a sweep `a,b,c`; None for a call such as range(1,5), which Hydra expands."""
    return None if is_call(value) else split(value)


def as_typed(value: str, *, kind: str, free: bool) -> str:
    """An override's value for an option of type `kind`, quoted so that Hydra returns what was typed.

    `free`: the text may be anything, such as a prompt; then brackets and calls have no special meaning.
    """
    if kind == "str":
        return _text(value, free=free)
    if kind == "list[str]":
        inside = value.strip()
        if inside.startswith("[") and inside.endswith("]") and len(split(inside)) == 1:
            items = [item for item in split(inside[1:-1]) if item] if inside[1:-1].strip() else []
            return "[" + ",".join(item if is_quoted(item) else quoted(item) for item in items) + "]"
        return _text(value, free=False)
    if kind == "int":
        return _whole(value)
    return value


def _text(value: str, *, free: bool) -> str:
    stripped = value.strip()
    if value == "" or is_quoted(stripped) or (stripped.lower() == "null" and not free):
        return stripped
    if free or not stripped:
        return quoted(value if value.count("${") == len(_REFERENCE.findall(value)) else escaped(value))
    if _CALL.fullmatch(stripped) or (stripped[0] in "[{" and stripped[-1] in "]}"):
        return value
    return quoted(value)


def _whole(value: str) -> str:
    """Integers in exponent notation, such as 1e9 and 2.5e6, without it; other values unchanged."""
    text = value.strip()
    if not _NUMBER.fullmatch(text) or not re.search(r"[.eE]", text):
        return value
    try:
        number = Decimal(text.replace("_", ""))
    except InvalidOperation:
        return value
    if (
        not number.is_finite()
        or abs(number.adjusted()) > _MOST_DIGITS
        or number != number.to_integral_value()
    ):
        return value
    return str(int(number))


def mapping(value: str, *, numbers: bool) -> dict[str, str] | None:
    """`{key:value, ...}` as a dict of keys and values as typed; None if the text does not have this form.

    The first colon ends a key; with `numbers` (values are numbers) the last one, so that a key
    may be any path.
    """
    text = value.strip()
    if not (text.startswith("{") and text.endswith("}")):
        return None
    result = {}
    for part in (part for part in split(text[1:-1]) if part):
        head = _QUOTED.match(part)
        if head is None:
            key, colon, item = part.rpartition(":") if numbers else part.partition(":")
        else:
            key, colon, item = head[0], part[head.end() :].strip()[:1], part[head.end() :].partition(":")[2]
        if colon != ":":
            return None
        result[_bare(key)] = _bare(item)
    return result


def _bare(text: str) -> str:
    """`text` without surrounding spaces and quotes."""
    text = text.strip()
    return re.sub(r"\\(['\"])", r"\1", text[1:-1]) if is_quoted(text) else text
