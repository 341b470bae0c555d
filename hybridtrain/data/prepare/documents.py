"""From records to documents: each is checked and its split decided; and counts of what was met."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hybridtrain.data.prepare import blocks, conversations, labelled, readers
from hybridtrain.data.prepare.blocks import BY_CHANCE, SURELY
from hybridtrain.data.prepare.conversations import Conversation, Unreadable
from hybridtrain.data.prepare.recipe import Recipe
from hybridtrain.data.prepare.units import Unit
from hybridtrain.errors import refusal

NO_TEXT = "documents without text, left out"


@dataclass
class Counts:
    """What was met in a piece, or in all of them."""

    text_bytes: int
    tokens: int
    bad: int
    """Records left out because they could not be read."""
    first_bad: str
    damaged: int
    """Documents with U+FFFD or bytes that are not UTF-8."""
    first_damaged: str
    controls: int
    """Documents of text that spell out special tokens of the tokenizer, which become these tokens."""
    first_control: str
    held_out: dict[str, str]
    """Records of which blocks are held out: digest to how."""

    conversations: int
    forms: dict[str, int]
    """Conversations by the form of their record."""
    unread: dict[str, int]
    """Records by a field that is not read."""
    notes: dict[str, list[Any]]
    """[how many, the first] of what is worth knowing."""

    @classmethod
    def none(cls) -> Counts:
        return cls(
            text_bytes=0,
            tokens=0,
            bad=0,
            first_bad="",
            damaged=0,
            first_damaged="",
            controls=0,
            first_control="",
            held_out={},
            conversations=0,
            forms={},
            unread={},
            notes={},
        )

    @classmethod
    def of(cls, folders: Iterable[Path]) -> Counts:
        """The sum over complete pieces, in order."""
        total = cls.none()
        for folder in folders:
            one = json.loads((folder / "counts.json").read_text())
            for name, value in one.items():
                have = getattr(total, name)
                setattr(total, name, _merged(have, value) if isinstance(value, dict) else have or value if isinstance(value, str) else have + value)
        return total

    def note(self, what: str, unit: Unit, number: int) -> None:
        """Count something met in a record; the place of the first is kept."""
        count, first = self.notes.get(what, (0, ""))
        self.notes[what] = [count + 1, first or readers.where(unit, number)]


class Document(NamedTuple):
    """A record that is to be encoded."""

    unit: Unit
    number: int
    value: Any
    size: int
    digest: bytes
    held_out: bool


def documents(unit: Unit, *, recipe: Recipe, counts: Counts) -> Iterator[Document]:
    """The documents of a unit, split decided; empty ones are none, and counted. Counts what it meets; raises UserError for a bad record unless skip_bad."""
    named = unit.source.held_out
    for number, value, problem, instead in readers.records(unit):
        if not problem:
            if recipe.chat:
                value, content, problem, instead = _conversation(value, unit, number, counts=counts)
            elif recipe.labels:
                text, label = value
                value, content, problem = labelled.document(_text(text), label, recipe=recipe.labels, forms=counts.forms)
            else:
                value, content, problem = _text(value)
        if problem:
            bad_record(unit, number, problem, instead=instead, recipe=recipe, counts=counts)
        elif value:
            digest = hashlib.blake2b(content, digest_size=16).digest() if named is None or recipe.deduplicate else b""
            if "\ufffd".encode() in content:
                counts.damaged += 1
                counts.first_damaged = counts.first_damaged or readers.where(unit, number)
            size, content = len(content), b""  # not held while a long document is encoded
            if how := unit.source.blocks or _how(digest, size=size, recipe=recipe, counts=counts):
                yield from _cut(unit, number, value, key=unit.source.name if unit.source.blocks else digest.hex(), how=how, recipe=recipe)
            else:
                held_out = blocks.share(digest) < recipe.eval_fraction if named is None else named
                yield Document(unit, number, value, size, digest, held_out)
        elif not recipe.chat:
            counts.note(NO_TEXT, unit, number)


def _how(digest: bytes, *, size: int, recipe: Recipe, counts: Counts) -> str:
    """How blocks of a record are held out; "" for one that is a document as a whole."""
    if not recipe.total or not digest:
        return ""
    how = recipe.before.get(digest.hex()) or (BY_CHANCE if blocks.is_long(size, total=recipe.total) else "")
    if how and size > recipe.total / 3:  # a third of the corpus and more: chance may leave it out altogether
        how = SURELY
    if how:
        counts.held_out[digest.hex()] = how
    return how


def _cut(unit: Unit, number: int, text: str, *, key: str, how: str, recipe: Recipe) -> Iterator[Document]:
    for part, held_out in blocks.cut(text, key=key, fraction=recipe.eval_fraction, how=how):
        content = part.encode()
        yield Document(unit, number, part, len(content), hashlib.blake2b(content, digest_size=16).digest() if recipe.deduplicate else b"", held_out)


def _text(value: Any) -> tuple[str, bytes, str]:
    """(text, its bytes, problem): half a surrogate pair, which JSON can write and UTF-8 cannot, becomes U+FFFD."""
    if not isinstance(value, str):
        return "", b"", f"its field holds no text but {_short(value)}"
    try:
        return value, value.encode(), ""
    except UnicodeEncodeError:
        value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return value, value.encode(), ""


def _conversation(record: Any, unit: Unit, number: int, *, counts: Counts) -> tuple[Conversation | None, bytes, str, str]:
    """(conversation, what identifies it, problem, what to try); one without messages is none."""
    try:
        found = conversations.read(record, key=unit.fields.key)
    except Unreadable as error:
        return None, b"", str(error), f"{error.instead}, or {readers.SKIP}" if error.instead else ""
    if found is None:
        counts.note("records without any message, left out", unit, number)
        return None, b"", "", ""
    counts.conversations += 1
    counts.forms[found.form] = counts.forms.get(found.form, 0) + 1
    for name in found.unread:
        counts.unread[name] = counts.unread.get(name, 0) + 1
    return found, found.content, "", ""


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Counts by name, [count, first place] by name, or words by name, of both."""
    total = dict(first)
    for name, value in second.items():
        if isinstance(value, list):
            have = total.get(name, [0, ""])
            total[name] = [have[0] + value[0], have[1] or value[1]]
        elif isinstance(value, str):
            total.setdefault(name, value)
        else:
            total[name] = total.get(name, 0) + value
    return total


def _short(value: Any) -> str:
    try:
        shown = repr(value)
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply"
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def bad_record(unit: Unit, number: int, problem: str, *, instead: str, recipe: Recipe, counts: Counts) -> None:
    """Refuse a record that cannot be read or encoded (raises UserError), or count it under skip_bad."""
    if not recipe.skip_bad:
        option = unit.fields.option
        words = f"records with {'messages' if recipe.chat else 'text'} in the field that {option} names"
        allowed = f"text in {unit.fields.encoding}" if unit.source.format == "text" else words
        raise refusal("data.source", readers.where(unit, number), problem, allowed=allowed, instead=instead or f"another {option}, or {readers.SKIP}")
    counts.bad += 1
    counts.first_bad = counts.first_bad or f"{readers.where(unit, number)}: {problem}"
