"""The restartable middle of `prepare`: a corpus in pieces, each tokenised aside and renamed into place.

pieces <- plan(sources)      fixed by the sources alone, so that any number of workers makes the same bytes
piece-<n>/                   {train,eval}.{bin,idx}, the same with .loss for conversations; digests.npy; counts.json
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hybridtrain.data.indexed import IndexedWriter, token_dtype
from hybridtrain.data.prepare import blocks, conversations, labelled, readers
from hybridtrain.data.prepare.blocks import BY_CHANCE, SURELY
from hybridtrain.data.prepare.chat import Encoded, Sample
from hybridtrain.data.prepare.conversations import Conversation, Unreadable
from hybridtrain.data.prepare.labelled import LabelRecipe
from hybridtrain.data.prepare.sources import Source
from hybridtrain.data.prepare.units import Fields, Unit
from hybridtrain.errors import UserError, refusal
from hybridtrain.runtime.files import write_atomically

MAX_PIECES = 1024  # the restart grain of a large corpus
MIN_PIECE_BYTES = 1 << 20  # and of a small one
BATCH_BYTES = 1 << 20  # text encoded at once, within some 100 bytes of memory per byte
LOSS_DTYPE = np.dtype("u1")
NO_TARGET = "conversations without an answer within data.seq_len tokens, left out"
NOT_LEARNT = "conversations none of whose answers is to be learnt, left out"
NO_TEXT = "documents without text, left out"
NO_IDS = "documents that the tokenizer makes no token of, left out"
DIGEST = np.dtype([("high", "<u8"), ("low", "<u8"), ("held_out", "?")])

Encode = Callable[[list[Any]], list[Encoded]]  # of each document
Report = Callable[[int, int], None]  # bytes of text, tokens


@dataclass(frozen=True)
class ChatRecipe:
    """How conversations become tokens."""

    tokenizer: str
    """What the user calls it."""
    turns: str
    """data.chat_turns."""
    seq_len: int
    """What is cut off behind it cannot be learnt."""


@dataclass(frozen=True)
class Recipe:
    """What the bytes of a piece depend on, besides its units and the tokenizer."""

    chat: ChatRecipe | None
    """Of conversations."""
    labels: LabelRecipe | None
    """Of texts with a label; neither: documents are text."""
    eval_fraction: float
    deduplicate: bool
    skip_bad: bool
    total: int
    """Bytes of text in all, about: a record that is much of it is cut into what is held out and what is not; 0: none is."""
    before: Mapping[str, str]
    """How records that an earlier `prepare` of the folder cut were held out, by digest."""
    eos: list[int]
    """Ids after each document."""
    controls: list[int]
    """Ids of special tokens: in a document of text they are counted."""
    vocab_size: int

    @property
    def dtype(self) -> np.dtype:
        return token_dtype(self.vocab_size)

    @property
    def fitted(self) -> ChatRecipe | LabelRecipe | None:
        """Of documents that are fitted into rows whole, some of whose tokens carry loss; None: text."""
        return self.chat or self.labels


@dataclass(frozen=True)
class Piece:
    """Consecutive units that are tokenised together."""

    number: int
    units: list[Unit]

    @property
    def size(self) -> int:
        """Bytes of text, about."""
        return sum(unit.size for unit in self.units)

    def folder(self, partial: Path) -> Path:
        return partial / f"piece-{self.number:05d}"


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


def plan(sources: list[Source], *, fields: Fields) -> list[Piece]:
    """All pieces of a corpus. Opens each source, reading metadata only."""
    opened = [readers.open_source(source, fields=fields) for source in sources]
    limit = max(MIN_PIECE_BYTES, sum(source.size for source in opened) // MAX_PIECES)
    units = (unit for source in opened for unit in readers.cut(source, fields=fields, limit=limit))
    return [Piece(number=number, units=members) for number, members in enumerate(_grouped(units, limit=limit))]


def check_beginnings(pieces: list[Piece], *, recipe: Recipe) -> None:
    """Refuse a source whose first record is bad, before anything is made of it (raises UserError)."""
    first = {unit.source.path: unit for piece in reversed(pieces) for unit in reversed(piece.units) if unit.source.format != "text"}
    for unit in first.values():
        next(documents(unit, recipe=recipe, counts=Counts.none()), None)


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
            _bad(unit, number, problem, instead=instead, recipe=recipe, counts=counts)
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


def write_piece(piece: Piece, *, partial: Path, recipe: Recipe, encode: Encode, report: Report) -> None:
    """Tokenise a piece into its folder of `partial`. Raises UserError for a bad record (unless `skip_bad`) and OSError for a full disk."""
    aside = piece.folder(partial).with_suffix(f".{os.getpid()}.aside")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    counts, digests = Counts.none(), bytearray()
    end = np.array(recipe.eos, dtype=np.int32)
    with ExitStack() as stack:
        tokens = {name: stack.enter_context(IndexedWriter(aside / name, dtype=recipe.dtype)) for name in ("train", "eval")}
        losses = {name: stack.enter_context(IndexedWriter(aside / f"{name}.loss", dtype=LOSS_DTYPE)) for name in tokens if recipe.fitted}
        for batch in _batches(piece, recipe=recipe, counts=counts):
            before = counts.tokens
            for document, samples in _encoded(batch, encode=encode, recipe=recipe, counts=counts):
                name = "eval" if document.held_out else "train"
                for sample, (ids, mask) in enumerate(samples):
                    tokens[name].add(np.concatenate([ids, end]))
                    if mask is not None:
                        losses[name].add(mask)
                    if recipe.deduplicate:
                        digests += _digest_of(document, sample=sample) + bytes([document.held_out])
                    counts.tokens += len(ids) + len(end)
                counts.text_bytes += document.size
            report(sum(document.size for document in batch), counts.tokens - before)
    if recipe.deduplicate:
        np.save(aside / "digests.npy", np.frombuffer(digests, dtype=DIGEST))
    write_atomically(aside / "counts.json", json.dumps(asdict(counts)))
    report(0, 0)  # a worker whose `prepare` is gone ends here
    aside.rename(piece.folder(partial))


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


def _digest_of(document: Document, *, sample: int) -> bytes:
    """Samples of one conversation are no duplicates of one another; those of identical conversations are."""
    return hashlib.blake2b(document.digest + bytes([sample % 256]), digest_size=16).digest() if sample else document.digest


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


def _bad(unit: Unit, number: int, problem: str, *, instead: str, recipe: Recipe, counts: Counts) -> None:
    if not recipe.skip_bad:
        option = unit.fields.option
        words = f"records with {'messages' if recipe.chat else 'text'} in the field that {option} names"
        allowed = f"text in {unit.fields.encoding}" if unit.source.format == "text" else words
        raise refusal("data.source", readers.where(unit, number), problem, allowed=allowed, instead=instead or f"another {option}, or {readers.SKIP}")
    counts.bad += 1
    counts.first_bad = counts.first_bad or f"{readers.where(unit, number)}: {problem}"


def _batches(piece: Piece, *, recipe: Recipe, counts: Counts) -> Iterator[list[Document]]:
    yield from _grouped((document for unit in piece.units for document in documents(unit, recipe=recipe, counts=counts)), limit=BATCH_BYTES)


def _encoded(batch: list[Document], *, encode: Encode, recipe: Recipe, counts: Counts) -> Iterator[tuple[Document, list[Sample]]]:
    """Each document with its samples; those without ids or without a target are left out, what the tokenizer refuses is a bad record."""
    try:
        encoded = encode([document.value for document in batch])
    except UserError as error:
        if len(batch) > 1:
            for document in batch:
                yield from _encoded([document], encode=encode, recipe=recipe, counts=counts)
        else:
            _bad(batch[0].unit, batch[0].number, str(error).partition("\n")[0], instead="", recipe=recipe, counts=counts)
        return
    except Exception as error:
        error.add_note(f"while encoding {readers.where(batch[0].unit, batch[0].number)} to {readers.where(batch[-1].unit, batch[-1].number)}")
        raise
    is_control = np.zeros(2 + max(recipe.controls, default=0), dtype=bool)  # the last: ids above
    is_control[recipe.controls] = True
    for document, (samples, notes, problem, instead) in zip(batch, encoded, strict=True):
        if problem:
            _bad(document.unit, document.number, problem, instead=f"{instead}, or {readers.SKIP}", recipe=recipe, counts=counts)
        for note in notes:
            counts.note(note, document.unit, document.number)
        if recipe.fitted is None and any(is_control.take(ids, mode="clip").any() for ids, _ in samples):
            counts.controls += 1
            counts.first_control = counts.first_control or readers.where(document.unit, document.number)
        kept = [(ids, mask) for ids, mask in samples if len(ids) and (recipe.fitted is None or _learnable(mask, seq_len=recipe.fitted.seq_len))]
        if len(kept) < len(samples):
            counts.note(_why_left_out(samples, recipe=recipe), document.unit, document.number)
        if kept:
            yield document, kept


def _why_left_out(samples: list[Sample], *, recipe: Recipe) -> str:
    if recipe.chat is None:
        return NO_IDS
    return NO_TARGET if any(_learnable(mask, seq_len=len(ids)) for ids, mask in samples) else NOT_LEARNT


def _learnable(mask: np.ndarray | None, *, seq_len: int) -> bool:
    """Whether any token carries loss in a row; the first of a conversation is never a target."""
    assert mask is not None
    return bool(mask[1 : seq_len + 1].any())


def _grouped(members: Iterable[Any], *, limit: int) -> Iterator[list[Any]]:
    """Consecutive members, each with a size, in groups that end once they reach `limit` bytes."""
    group: list[Any] = []
    size = 0
    for member in members:
        group.append(member)
        size += member.size
        if size >= limit:
            yield group
            group, size = [], 0
    if group:
        yield group
