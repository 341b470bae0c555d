"""The restartable middle of `prepare`: a corpus in pieces, each tokenised aside and renamed into place.

pieces <- plan(sources)      fixed by the sources alone, so that any number of workers makes the same bytes
piece-<n>/                   {train,eval}.{bin,idx}, the same with .loss for conversations; digests.npy; counts.json
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hybridtrain.data.indexed import IndexedWriter
from hybridtrain.data.prepare import readers
from hybridtrain.data.prepare.chat import Encoded, Sample
from hybridtrain.data.prepare.documents import Counts, Document, bad_record, documents
from hybridtrain.data.prepare.recipe import Recipe
from hybridtrain.data.prepare.sources import Source
from hybridtrain.data.prepare.units import Fields, Unit
from hybridtrain.errors import UserError
from hybridtrain.runtime.files import write_atomically

MAX_PIECES = 1024  # the restart grain of a large corpus
MIN_PIECE_BYTES = 1 << 20  # and of a small one
BATCH_BYTES = 1 << 20  # text encoded at once, within some 100 bytes of memory per byte
LOSS_DTYPE = np.dtype("u1")
NO_TARGET = "conversations without an answer within data.seq_len tokens, left out"
NOT_LEARNT = "conversations none of whose answers is to be learnt, left out"
NO_IDS = "documents that the tokenizer makes no token of, left out"
DIGEST = np.dtype([("high", "<u8"), ("low", "<u8"), ("held_out", "?")])

Encode = Callable[[list[Any]], list[Encoded]]  # of each document
Report = Callable[[int, int], None]  # bytes of text, tokens


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


def _digest_of(document: Document, *, sample: int) -> bytes:
    """Samples of one conversation are no duplicates of one another; those of identical conversations are."""
    return hashlib.blake2b(document.digest + bytes([sample % 256]), digest_size=16).digest() if sample else document.digest


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
            bad_record(batch[0].unit, batch[0].number, str(error).partition("\n")[0], instead="", recipe=recipe, counts=counts)
        return
    except Exception as error:
        error.add_note(f"while encoding {readers.where(batch[0].unit, batch[0].number)} to {readers.where(batch[-1].unit, batch[-1].number)}")
        raise
    is_control = np.zeros(2 + max(recipe.controls, default=0), dtype=bool)  # the last: ids above
    is_control[recipe.controls] = True
    for document, (samples, notes, problem, instead) in zip(batch, encoded, strict=True):
        if problem:
            bad_record(document.unit, document.number, problem, instead=f"{instead}, or {readers.SKIP}", recipe=recipe, counts=counts)
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
