"""Tokenizes a corpus in pieces, each written to a temporary folder and renamed, so that
`prepare` can be restarted.

pieces <- plan(sources)      depends on the sources only: any number of workers writes the same bytes
piece-<n>/                   {train,eval}.{bin,idx}, the same with .loss for conversations and .sentences
                             where these are marked; digests.npy; counts.json
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

MAX_PIECES = 1024
MIN_PIECE_BYTES = 1 << 20
BATCH_BYTES = 1 << 20  # text encoded at once; takes about 100 bytes of memory per byte
LOSS_DTYPE = np.dtype("u1")
NO_TARGET = "conversations without an answer within data.seq_len tokens, left out"
NO_LOSS = "conversations whose answers are all excluded from the loss, left out"
NO_IDS = "documents that the tokenizer encodes to no tokens, left out"
DIGEST = np.dtype([("high", "<u8"), ("low", "<u8"), ("held_out", "?")])

Encode = Callable[[list[Any]], list[Encoded]]  # one for each document
Report = Callable[[int, int], None]  # bytes of text, tokens


@dataclass(frozen=True)
class Piece:
    """Consecutive units that are tokenized together."""

    number: int
    units: list[Unit]

    @property
    def size(self) -> int:
        """Approximate bytes of text."""
        return sum(unit.size for unit in self.units)

    def folder(self, partial: Path) -> Path:
        return partial / f"piece-{self.number:05d}"


def plan(sources: list[Source], *, fields: Fields) -> list[Piece]:
    """All pieces of a corpus. Opens each source, but reads only metadata. Raises UserError."""
    opened = [readers.open_source(source, fields=fields) for source in sources]
    limit = max(MIN_PIECE_BYTES, sum(source.size for source in opened) // MAX_PIECES)
    units = (unit for source in opened for unit in readers.units_of(source, fields=fields, limit=limit))
    return [Piece(number=number, units=group) for number, group in enumerate(_group(units, limit=limit))]


def check_first_records(pieces: list[Piece], *, recipe: Recipe) -> None:
    """Raise UserError if the first record of a source is bad, before the tokenizer is trained."""
    first = {
        unit.source.path: unit
        for piece in reversed(pieces)
        for unit in reversed(piece.units)
        if unit.source.format != "text"
    }
    for unit in first.values():
        next(documents(unit, recipe=recipe, counts=Counts.zero()), None)


def write_piece(piece: Piece, *, partial: Path, recipe: Recipe, encode: Encode, report: Report) -> None:
    """Tokenize a piece into its folder in `partial`.

    Raises UserError for a bad record (unless `skip_bad`), OSError for a full disk.
    """
    temporary = piece.folder(partial).with_suffix(f".{os.getpid()}.aside")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    counts, digests = Counts.zero(), bytearray()
    end = np.array(recipe.eos, dtype=np.int32)
    with ExitStack() as stack:
        tokens = {
            name: stack.enter_context(IndexedWriter(temporary / name, dtype=recipe.dtype))
            for name in ("train", "eval")
        }
        masks = {
            name: stack.enter_context(IndexedWriter(temporary / f"{name}.{recipe.marks}", dtype=LOSS_DTYPE))
            for name in tokens
            if recipe.marks
        }
        for batch in _batches(piece, recipe=recipe, counts=counts):
            before = counts.tokens
            for document, samples in _encode(batch, encode=encode, recipe=recipe, counts=counts):
                name = "eval" if document.held_out else "train"
                for sample, (ids, mask) in enumerate(samples):
                    tokens[name].add(np.concatenate([ids, end]))
                    if mask is not None:
                        masks[name].add(mask)
                    if recipe.deduplicate:
                        digests += _digest_of(document, sample=sample) + bytes([document.held_out])
                    counts.tokens += len(ids) + len(end)
                counts.text_bytes += document.size
            report(sum(document.size for document in batch), counts.tokens - before)
    if recipe.deduplicate:
        np.save(temporary / "digests.npy", np.frombuffer(digests, dtype=DIGEST))
    write_atomically(temporary / "counts.json", json.dumps(asdict(counts)))
    report(0, 0)  # ends a worker whose parent process has ended
    temporary.rename(piece.folder(partial))


def _digest_of(document: Document, *, sample: int) -> bytes:
    """Digest to find duplicates: different for the samples of one conversation, the same for
    those of identical conversations.
    """
    return (
        hashlib.blake2b(document.digest + bytes([sample % 256]), digest_size=16).digest()
        if sample
        else document.digest
    )


def _batches(piece: Piece, *, recipe: Recipe, counts: Counts) -> Iterator[list[Document]]:
    yield from _group(
        (document for unit in piece.units for document in documents(unit, recipe=recipe, counts=counts)),
        limit=BATCH_BYTES,
    )


def _encode(
    batch: list[Document], *, encode: Encode, recipe: Recipe, counts: Counts
) -> Iterator[tuple[Document, list[Sample]]]:
    """(document, samples) for each document.

    Leaves out samples without ids or targets; what the tokenizer refuses is a bad record.
    """
    try:
        encoded = encode([document.value for document in batch])
    except UserError as error:
        if len(batch) > 1:
            for document in batch:
                yield from _encode([document], encode=encode, recipe=recipe, counts=counts)
        else:
            bad_record(
                batch[0].unit,
                batch[0].number,
                str(error).partition("\n")[0],
                instead="",
                recipe=recipe,
                counts=counts,
            )
        return
    except Exception as error:
        error.add_note(
            f"while encoding {readers.where(batch[0].unit, batch[0].number)} "
            f"to {readers.where(batch[-1].unit, batch[-1].number)}"
        )
        raise
    is_special = np.zeros(2 + max(recipe.special_ids, default=0), dtype=bool)  # last: all larger ids
    is_special[recipe.special_ids] = True
    for document, (samples, notes, problem, instead) in zip(batch, encoded, strict=True):
        if problem:
            bad_record(
                document.unit,
                document.number,
                problem,
                instead=f"{instead}, or {readers.SKIP}",
                recipe=recipe,
                counts=counts,
            )
        for note in notes:
            counts.note(note, document.unit, document.number)
        if recipe.packed is None and any(is_special.take(ids, mode="clip").any() for ids, _ in samples):
            counts.controls += 1
            counts.first_control = counts.first_control or readers.where(document.unit, document.number)
        kept = [
            (ids, mask)
            for ids, mask in samples
            if len(ids) and (recipe.packed is None or _has_targets(mask, seq_len=recipe.packed.seq_len))
        ]
        if len(kept) < len(samples):
            counts.note(_reason_left_out(samples, recipe=recipe), document.unit, document.number)
        if kept:
            yield document, kept


def _reason_left_out(samples: list[Sample], *, recipe: Recipe) -> str:
    if recipe.chat is None:
        return NO_IDS
    return NO_TARGET if any(_has_targets(mask, seq_len=len(ids)) for ids, mask in samples) else NO_LOSS


def _has_targets(mask: np.ndarray | None, *, seq_len: int) -> bool:
    """Whether any token within a row has loss. The first token of a sample is never a target."""
    assert mask is not None
    return bool(mask[1 : seq_len + 1].any())


def _group(members: Iterable[Any], *, limit: int) -> Iterator[list[Any]]:
    """Groups of consecutive members; a group ends when the sum of `size` reaches `limit` bytes."""
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
