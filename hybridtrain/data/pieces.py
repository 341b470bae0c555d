"""The restartable middle of `prepare`: a corpus in pieces, each tokenised aside and renamed into place, joined at the end."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hybridtrain.data.corpus import Document
from hybridtrain.data.indexed import IndexedReader, IndexedWriter, file_pair

MAX_PIECES = 256  # the restart grain of a large corpus
MIN_PIECE_BYTES = 1 << 20  # and of a small one
BATCH_BYTES = 4 << 20  # text encoded at once: keeps every core busy within some 100 bytes of memory per byte

Encode = Callable[[list[str]], list[np.ndarray]]  # int32 ids of each text


@dataclass(frozen=True)
class Joined:
    """What one split holds."""

    documents: int
    tokens: int
    largest_id: int


def tokenise(documents: list[Document], *, folder: Path, encode: Encode, eos: list[int], dtype: np.dtype) -> list[Path]:
    """Tokenise the documents into folders `piece-<n>` of `folder`, except those that are there; return all in order.

    A piece holds a train pair and an eval pair of token files, or one of them. Each document is followed by `eos`.
    """
    total = sum(document.size for document in documents)
    meter = _Meter(total)
    made = []
    for number, members in enumerate(_grouped(documents, limit=max(MIN_PIECE_BYTES, total // MAX_PIECES))):
        piece = folder / f"piece-{number:05d}"
        if piece.exists():
            meter.skip(sum(document.size for document in members))
        else:
            _write_piece(piece, documents=members, encode=encode, eos=eos, dtype=dtype, meter=meter)
        made.append(piece)
    meter.end()
    return made


def join(made: list[Path], *, split: str, out: Path, dtype: np.dtype, identity: hashlib._Hash) -> Joined:
    """Concatenate one split of all pieces into the pair `out`; add its sizes and tokens to `identity` in the same order."""
    with IndexedWriter(out, dtype=dtype) as writer:
        for piece in made:
            if file_pair(piece / split)[0].exists():
                reader = IndexedReader(piece / split)
                writer.append(reader, keep=np.ones(reader.documents, dtype=bool))
    if not file_pair(out)[0].exists():
        return Joined(documents=0, tokens=0, largest_id=0)
    reader = IndexedReader(out)
    identity.update(reader.sizes.tobytes())
    largest, step = 0, 1 << 24
    for start in range(0, reader.tokens, step):
        tokens = reader.read(start, min(start + step, reader.tokens))
        identity.update(tokens.tobytes())
        largest = max(largest, int(tokens.max()))
    return Joined(documents=reader.documents, tokens=reader.tokens, largest_id=largest)


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    aside = path.with_suffix(".aside")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def say(line: str) -> None:
    """One line for the user, apart from the command's result on stdout."""
    print(line, file=sys.stderr, flush=True)


def _write_piece(piece: Path, *, documents: list[Document], encode: Encode, eos: list[int], dtype: np.dtype, meter: _Meter) -> None:
    aside = piece.with_suffix(".aside")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    end = np.array(eos, dtype=np.int32)
    with IndexedWriter(aside / "train", dtype=dtype) as train, IndexedWriter(aside / "eval", dtype=dtype) as held_out:
        for batch in _grouped(documents, limit=BATCH_BYTES):
            texts = [document.text() for document in batch]
            tokens = 0
            for document, text, ids in zip(batch, texts, encode(texts), strict=True):
                if "\ufffd" in text:
                    meter.damaged.append(document.name)
                if len(ids):
                    (held_out if document.held_out else train).add(np.concatenate([ids, end]))
                    tokens += len(ids) + len(eos)
            meter.advance(sum(document.size for document in batch), tokens=tokens)
    aside.rename(piece)


def _grouped(documents: Iterable[Document], *, limit: int) -> Iterator[list[Document]]:
    """Consecutive documents in groups that end once they reach `limit` bytes."""
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += document.size
        if size >= limit:
            yield group
            group, size = [], 0
    if group:
        yield group


class _Meter:
    """The progress line: rewritten in place on a terminal, else a new line every 10 s, and one at the end."""

    def __init__(self, total: int) -> None:
        self.damaged: list[str] = []
        self._total, self._skipped, self._done, self._tokens = total, 0, 0, 0
        self._start = time.perf_counter()
        self._shown = self._start
        self._terminal = sys.stderr.isatty()

    def skip(self, size: int) -> None:
        """`size` bytes of text were done by an earlier call."""
        self._skipped += size

    def advance(self, size: int, *, tokens: int) -> None:
        """`size` more bytes of text became `tokens` tokens."""
        self._done += size
        self._tokens += tokens
        if self._done + self._skipped < self._total and time.perf_counter() - self._shown > (0.2 if self._terminal else 10):
            self._show(end="" if self._terminal else "\n")

    def end(self) -> None:
        """The last line, and what was wrong with the text."""
        self._show(end="\n")
        if self.damaged:
            say(f"{len(self.damaged)} documents hold U+FFFD or bytes that are not UTF-8 (read as U+FFFD), first {self.damaged[0]}")

    def _show(self, *, end: str) -> None:
        self._shown = time.perf_counter()
        spent = self._shown - self._start
        have, rate = self._done + self._skipped, self._done / max(spent, 1e-9)
        left = (self._total - have) / rate if rate else 0
        speed = f"{self._tokens / max(spent, 1e-9):,.0f} tokens/s"
        line = f"tokenising {100 * have / self._total:3.0f}%  {have / 1e6:.1f} of {self._total / 1e6:.1f} MB  {speed}  {left:.0f} s left"
        print(f"\r\x1b[K{line}" if self._terminal else line, end=end, file=sys.stderr, flush=True)
