"""Checks records, decides their split, and yields them as documents; counts what it finds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hybridtrain.data.prepare import answers, blocks, conversations, labelled, readers, words
from hybridtrain.data.prepare.answers import Answered
from hybridtrain.data.prepare.blocks import BY_CHANCE, SURELY
from hybridtrain.data.prepare.conversations import Conversation, Unreadable
from hybridtrain.data.prepare.labelled import Labelled, LabelRecipe
from hybridtrain.data.prepare.recipe import Recipe
from hybridtrain.data.prepare.sources import ANSWERS, LABELLED_WORDS
from hybridtrain.data.prepare.units import Unit
from hybridtrain.data.prepare.words import Words
from hybridtrain.errors import refusal

NO_TEXT = "documents without text, left out"


@dataclass
class Counts:
    """Statistics of a piece, or of all pieces."""

    text_bytes: int
    tokens: int
    bad: int
    """Records skipped because they cannot be read."""
    first_bad: str
    damaged: int
    """Documents with U+FFFD or bytes that are not UTF-8."""
    first_damaged: str
    controls: int
    """Documents whose text contains special tokens of the tokenizer, and is encoded with them."""
    first_control: str
    held_out: dict[str, str]
    """Digest -> how, for records of which blocks are held out."""

    conversations: int
    forms: dict[str, int]
    """Form of the record -> number of conversations."""
    unread: dict[str, int]
    """Name of a field that is not read -> number of records."""
    notes: dict[str, list[Any]]
    """Note to report -> [number of records, place of the first]."""

    @classmethod
    def zero(cls) -> Counts:
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
    def load(cls, folders: Iterable[Path]) -> Counts:
        """The sum over the folders of complete pieces, in order."""
        total = cls.zero()
        for folder in folders:
            counts = json.loads((folder / "counts.json").read_text())
            for name, value in counts.items():
                old = getattr(total, name)
                setattr(
                    total,
                    name,
                    _merge(old, value)
                    if isinstance(value, dict)
                    else old or value
                    if isinstance(value, str)
                    else old + value,
                )
        return total

    def note(self, text: str, unit: Unit, number: int) -> None:
        """Count a note about a record; keeps the place of the first."""
        count, first = self.notes.get(text, (0, ""))
        self.notes[text] = [count + 1, first or readers.where(unit, number)]


class Document(NamedTuple):
    """A record, ready to be encoded."""

    unit: Unit
    number: int
    value: Any
    size: int
    digest: bytes
    held_out: bool


def documents(unit: Unit, *, recipe: Recipe, counts: Counts) -> Iterator[Document]:
    """The documents of a unit that are not empty, with their split decided. Updates `counts`.

    Raises UserError for a bad record unless skip_bad.
    """
    source_held_out = unit.source.held_out
    for number, value, problem, instead in readers.records(unit):
        if not problem:
            if recipe.chat:
                value, content, problem, instead = _conversation(value, unit, number, counts=counts)
            elif recipe.labels:
                value, content, problem = _labelled(value, recipe=recipe.labels, counts=counts)
                instead = f"fields {', '.join(answers.FIELDS)}" if recipe.labels.form == ANSWERS else ""
                instead += f", or {readers.SKIP}" if instead else ""
            else:
                value, content, problem = _text(value)
        if problem:
            bad_record(unit, number, problem, instead=instead, recipe=recipe, counts=counts)
        elif value:
            digest = (
                hashlib.blake2b(content, digest_size=16).digest()
                if source_held_out is None or recipe.deduplicate
                else b""
            )
            if "\ufffd".encode() in content:
                counts.damaged += 1
                counts.first_damaged = counts.first_damaged or readers.where(unit, number)
            size, content = len(content), b""  # frees memory while a long document is encoded
            if how := unit.source.blocks or _hold_out_blocks(digest, size=size, recipe=recipe, counts=counts):
                yield from _cut(
                    unit,
                    number,
                    value,
                    key=unit.source.name if unit.source.blocks else digest.hex(),
                    how=how,
                    recipe=recipe,
                )
            else:
                held_out = (
                    blocks.share(digest) < recipe.eval_fraction
                    if source_held_out is None
                    else source_held_out
                )
                yield Document(unit, number, value, size, digest, held_out)
        elif not recipe.chat:
            counts.note(NO_TEXT, unit, number)


def _hold_out_blocks(digest: bytes, *, size: int, recipe: Recipe, counts: Counts) -> str:
    """How blocks of a record are held out (blocks.py); "" for a record that is one document."""
    if not recipe.total_bytes or not digest:
        return ""
    how = recipe.held_out_before.get(digest.hex()) or (
        BY_CHANCE if blocks.is_long(size, total=recipe.total_bytes) else ""
    )
    if how and size > recipe.total_bytes / 3:  # by chance, the eval split might get nothing of it
        how = SURELY
    if how:
        counts.held_out[digest.hex()] = how
    return how


def _cut(unit: Unit, number: int, text: str, *, key: str, how: str, recipe: Recipe) -> Iterator[Document]:
    for part, held_out in blocks.cut(text, key=key, fraction=recipe.eval_fraction, how=how):
        content = part.encode()
        yield Document(
            unit,
            number,
            part,
            len(content),
            hashlib.blake2b(content, digest_size=16).digest() if recipe.deduplicate else b"",
            held_out,
        )


def _text(value: Any) -> tuple[str, bytes, str]:
    """(text, its bytes, problem).

    A lone surrogate, which is valid in JSON but not in UTF-8, becomes U+FFFD.
    """
    if not isinstance(value, str):
        return "", b"", f"its field holds no text but {_short(value)}"
    try:
        return value, value.encode(), ""
    except UnicodeEncodeError:
        value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return value, value.encode(), ""


def _labelled(
    value: Any, *, recipe: LabelRecipe, counts: Counts
) -> tuple[Labelled | Words | Answered | None, bytes, str]:
    """(document, its content for the digest, problem)."""
    if recipe.form == ANSWERS:
        return answers.document(value)
    text, label = value
    if recipe.form == LABELLED_WORDS:
        return words.document(text, label, recipe=recipe, forms=counts.forms)
    return labelled.document(_text(text), label, recipe=recipe, forms=counts.forms)


def _conversation(
    record: Any, unit: Unit, number: int, *, counts: Counts
) -> tuple[Conversation | None, bytes, str, str]:
    """(conversation, its content for the digest, problem, what to try); the conversation
    is None without messages.
    """
    try:
        conversation = conversations.read(record, key=unit.fields.key)
    except Unreadable as error:
        return None, b"", str(error), f"{error.instead}, or {readers.SKIP}" if error.instead else ""
    if conversation is None:
        counts.note("records without any message, left out", unit, number)
        return None, b"", "", ""
    counts.conversations += 1
    counts.forms[conversation.form] = counts.forms.get(conversation.form, 0) + 1
    for name in conversation.unread:
        counts.unread[name] = counts.unread.get(name, 0) + 1
    return conversation, conversation.content, "", ""


def _merge(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The sum of two mappings, whose values are counts, [count, first place] or texts (the first is kept)."""
    total = dict(first)
    for name, value in second.items():
        if isinstance(value, list):
            old = total.get(name, [0, ""])
            total[name] = [old[0] + value[0], old[1] or value[1]]
        elif isinstance(value, str):
            total.setdefault(name, value)
        else:
            total[name] = total.get(name, 0) + value
    return total


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply"
    return text if len(text) <= 80 else f"{text[:77]}..."


def bad_record(
    unit: Unit, number: int, problem: str, *, instead: str, recipe: Recipe, counts: Counts
) -> None:
    """Raise UserError for a record that cannot be read or encoded; with skip_bad, only count it."""
    if not recipe.skip_bad:
        option = unit.fields.option
        good_records = (
            f"records with {'messages' if recipe.chat else 'text'} in the field that {option} names"
        )
        allowed = f"text in {unit.fields.encoding}" if unit.source.format == "text" else good_records
        raise refusal(
            "data.source",
            readers.where(unit, number),
            problem,
            allowed=allowed,
            instead=instead or f"another {option}, or {readers.SKIP}",
        )
    counts.bad += 1
    counts.first_bad = counts.first_bad or f"{readers.where(unit, number)}: {problem}"
