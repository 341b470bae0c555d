"""A corpus for training: a folder that `prepare` completed, or a pair of token files from elsewhere.

Opening reads only metadata and writes nothing, so that thousands of ranks can do it on a
shared disk. No torch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from hybridtrain.data import digests, prepare_command
from hybridtrain.data.indexed import IndexedReader, file_pair
from hybridtrain.data.pairs import PairRows, row_file
from hybridtrain.data.prepare.folder import CORPUS, PARTIAL, PLAN
from hybridtrain.data.prepare.packing import row_files, targets
from hybridtrain.data.prepare.sources import CHAT, FORMAT, PACKED_FORMATS, READABLE
from hybridtrain.data.rows import ChatRows, Rows, TextRows, count_rows
from hybridtrain.errors import UserError, refusal
from hybridtrain.runtime import log
from hybridtrain.runtime.files import read_object


@dataclass(frozen=True)
class Corpus:
    """The token files of a corpus."""

    path: Path
    """The folder, or the prefix of two token files."""
    readers: Mapping[str, IndexedReader]
    """Split -> its token files; a split without documents has none."""
    facts: Mapping[str, Any] | None
    """corpus.json; None for token files from elsewhere, which have only an index."""
    paired: bool = False
    """Whether its rows are pairs of parts of text (task.next_sentence)."""
    single: bool = False
    """Whether each of its packed documents is a row of its own."""

    @classmethod
    def open(cls, path: str | Path) -> Corpus:
        """Open a prepared folder, or PREFIX for PREFIX.bin and PREFIX.idx.

        Raises UserError if it is neither, or if a token file is missing, empty, truncated or not of the size
        in corpus.json. Rank 0 also checks the index, and local rank 0 of each machine a sample of the files.
        """
        path = Path(path)
        if not path.is_dir() and any(file.is_file() for file in file_pair(path)):
            return cls(path, {"train": IndexedReader(path)}, None)._checked()
        return _prepared(path)._checked()

    @classmethod
    def held_out(cls, path: str | Path) -> Corpus:
        """PREFIX.bin and PREFIX.idx as a corpus with only an eval split."""
        path = Path(path)
        return cls(path, {"eval": IndexedReader(path)}, None)._checked()

    def _checked(self) -> Corpus:
        if log.rank() == 0:
            for split, reader in self.readers.items():
                reader.check()
                if self.packed:
                    _check_loss(reader, IndexedReader(self.path / f"{split}.loss"))
                if self.has_pairs:
                    _check_loss(reader, IndexedReader(self.path / f"{split}.sentences"))
                if self.facts is None:
                    reader.check_not_zeros()
        if log.rank() == 0 or os.environ.get("LOCAL_RANK") == "0":
            for name, written in (self.digests or {}).items():
                if problem := _changed(self.path / name, written):
                    raise _unprepared(self.path, f"{name} {problem}")
        return self

    @property
    def digests(self) -> Mapping[str, Mapping[str, Any]] | None:
        """File -> its digests; None for token files from elsewhere and corpora of version 0.1."""
        return None if self.facts is None else self.facts.get("digests")

    @cached_property
    def sample(self) -> str | None:
        """sha256 over a sample of the token files, for corpora of version 0.1, which have
        no digests; else None.
        """
        if self.facts is None or self.digests is not None:
            return None
        digest = hashlib.sha256()
        for split in sorted(self.readers):
            for file in file_pair(self.path / split):
                digests.add_sample(digest, file)
        return digest.hexdigest()

    @property
    def packed(self) -> bool:
        """Whether its documents (conversations or texts with labels) are packed whole into rows; else it is
        a stream of text.
        """
        return self.facts is not None and self.facts.get("kind") in PACKED_FORMATS

    @property
    def kind(self) -> str:
        """data.format of packed documents; text for others."""
        return "text" if self.facts is None else self.facts.get("kind", "text")

    @property
    def has_pairs(self) -> bool:
        """Whether `prepare` found its sentences, and rows of them."""
        return self.facts is not None and "pairs" in self.facts

    @property
    def labels(self) -> list[str]:
        """Class names of its documents' labels; empty without labels."""
        return [] if self.facts is None else self.facts.get("labels", [])

    @property
    def vocab_size(self) -> int | None:
        """Size of the tokenizer's vocabulary; None if unknown."""
        return None if self.facts is None else self.facts["vocab_size"]

    @property
    def eos_id(self) -> int | None:
        return None if self.facts is None else self.facts["eos_id"]

    @property
    def largest_id(self) -> int | None:
        """Largest token id in the files; None if unknown."""
        return None if self.facts is None else self.facts["largest_id"]

    @property
    def tokenizer_dir(self) -> Path:
        return self.path / "tokenizer"

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over tokens, sizes and tokenizer, computed by `prepare`; of token files from elsewhere over
        size and a sample.
        """
        if self.facts is not None:
            return self.facts["fingerprint"]
        digest = hashlib.sha256()
        for file in file_pair(self.path):
            digests.add_sample(digest, file)
        return digest.hexdigest()

    def count(self, split: str, *, seq_len: int) -> int:
        """Number of rows of `seq_len` in a split.

        Raises UserError if its documents are packed for another seq_len.
        """
        if split not in self.readers:
            return 0
        if self.paired:
            return len(self._pairs(split, seq_len=seq_len))
        return (
            len(self._row_index(split, seq_len=seq_len)[1]) - 1
            if self.packed
            else count_rows(self.readers[split].tokens, seq_len=seq_len)
        )

    def has_targets(self, split: str, *, seq_len: int) -> bool:
        """Whether the rows of a split have any target.

        Old corpora without `kept_tokens` need reading masks up to the first one.
        """
        if not self.packed:
            return True
        assert self.facts is not None
        figures = self.facts["splits"][split]
        if "kept_tokens" in figures:
            return figures["loss_tokens"] > 0
        return any(part.any() for part in targets(self.path, split=split, seq_len=seq_len))

    def rows(self, split: str, *, seq_len: int, documents: bool, vocab: int) -> Rows | PairRows:
        """The rows of a split with documents.

        `vocab`: of the model; `documents`: their blocks have doc_start.
        """
        reader, check = self.readers[split], partial(self._check, split=split, vocab=vocab)
        if self.paired:
            marks = IndexedReader(self.path / f"{split}.sentences")
            pairs = self._pairs(split, seq_len=seq_len)
            return PairRows(reader, marks, rows=pairs, seq_len=seq_len, check=check)
        if not self.packed:
            return TextRows(reader, seq_len=seq_len, documents=documents, check=check)
        assert documents
        ids, starts = self._row_index(split, seq_len=seq_len)
        return ChatRows(
            reader,
            IndexedReader(self.path / f"{split}.loss"),
            ids=ids,
            starts=starts,
            seq_len=seq_len,
            check=check,
        )

    def _pairs(self, split: str, *, seq_len: int) -> np.ndarray:
        self._check_length(seq_len, what="sentences")
        file = row_file(self.path, split=split)
        try:
            rows = np.load(file, mmap_mode="r")
        except Exception as error:  # as below
            raise _unprepared(self.path, f"{file.name} cannot be read ({type(error).__name__})") from error
        assert self.facts is not None
        if rows.dtype != np.int64 or rows.shape != (self.facts["pairs"].get(split), 3):
            raise _unprepared(self.path, f"{file.name} is not of its sentences")
        return rows

    def _check_length(self, seq_len: int, *, what: str) -> None:
        assert self.facts is not None
        if seq_len != self.facts["seq_len"]:
            raise refusal(
                "data.seq_len",
                seq_len,
                f"the {what} of {self.path} are packed into rows of {self.facts['seq_len']}",
                allowed=f"{self.facts['seq_len']}",
                instead=(
                    f"data.seq_len={self.facts['seq_len']}, "
                    f"or prepare again with data.seq_len={seq_len} prepare.overwrite=true"
                ),
            )

    def _row_index(self, split: str, *, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        self._check_length(seq_len, what="conversations")
        try:
            ids, starts = (np.load(file, mmap_mode="r") for file in row_files(self.path, split=split))
        except Exception as error:  # a damaged header makes numpy raise whatever its parser raises
            raise _unprepared(
                self.path, f"its row index cannot be read ({type(error).__name__}: {error})"
            ) from error
        if problem := _row_problem(ids, starts, conversations=self.readers[split].sequences):
            raise _unprepared(self.path, f"its row index {problem}")
        return ids, np.arange(len(ids) + 1) if self.single else starts

    def _check(self, tokens: np.ndarray, *, split: str, vocab: int) -> None:
        """Refuse token ids outside the vocabulary, which crash in the embedding, on a GPU
        without a useful message.
        """
        smallest, largest = int(tokens.min(initial=0)), int(tokens.max(initial=0))
        if self.largest_id is not None and largest > self.largest_id:
            raise _unprepared(
                self.path,
                (
                    f"token id {largest} was read from it, "
                    f"but the largest that prepare wrote is {self.largest_id}; a file has changed"
                ),
            )
        if smallest < 0 or largest >= vocab:
            raise refusal(
                "model.config.vocab_size",
                vocab,
                f"{self.readers[split].bin_path} holds token id {smallest if smallest < 0 else largest}",
                allowed=f"token ids of 0 to {vocab - 1}",
                instead="a model with the vocabulary of the tokenizer that made the file",
            )


def _row_problem(ids: np.ndarray, starts: np.ndarray, *, conversations: int) -> str:
    """What is wrong with a row index; "" if nothing."""
    if (
        ids.dtype != np.int64
        or starts.dtype != np.int64
        or ids.ndim != 1
        or starts.ndim != 1
        or len(starts) < 2
    ):
        return f"has arrays of {ids.dtype} {ids.shape} and {starts.dtype} {starts.shape}"
    if len(ids) > conversations or starts[0] != 0 or starts[-1] != len(ids):
        return (
            f"is of {len(ids)} conversations, of which {starts[-1]} are in rows, "
            f"but the corpus has {conversations}"
        )
    if log.rank() == 0 and (
        (np.diff(starts) < 0).any() or ids.min(initial=0) < 0 or ids.max(initial=0) >= conversations
    ):
        return f"names conversations that are not among {conversations}, or rows backwards"
    return ""


def _check_loss(reader: IndexedReader, loss: IndexedReader) -> None:
    loss.check()
    if loss.sequences != reader.sequences or not np.array_equal(loss.sizes, reader.sizes):
        raise _unprepared(
            loss.idx_path.parent,
            f"{loss.idx_path.name} is not of the conversations of {reader.idx_path.name}",
        )


def changed_files(folder: Path, *, written: Any) -> list[str]:
    """Messages about files of a prepared folder that differ from their record `written`;
    empty without a record.
    """
    if not isinstance(written, Mapping):
        return []
    try:
        problems = {name: _changed(folder / name, values) for name, values in written.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise _unprepared(folder, f"its corpus.json lacks {error}") from error
    return [f"{name} {problem}" for name, problem in problems.items() if problem]


def _changed(file: Path, written: Mapping[str, Any]) -> str:
    return digests.difference(file, written, by="sample", of=digests.sample_hash, writer="prepare")


_KINDS = {
    "vocab_size": (int,),
    "largest_id": (int,),
    "eos_id": (int, type(None)),
    "fingerprint": (str,),
    "seq_len": (int,),
    "kind": (str,),
    "labels": (list,),
}


def _prepared(folder: Path) -> Corpus:
    facts = _facts(folder)
    try:
        if facts["format"] not in READABLE:
            raise _unprepared(folder, f"it has format {facts['format']}, this version reads {FORMAT}")
        counts = {
            split: (facts["splits"][split]["documents"], facts["splits"][split]["tokens"])
            for split in ("train", "eval")
        }
        kind = facts.get("kind")
        required = [
            "vocab_size",
            "largest_id",
            "eos_id",
            "fingerprint",
            *(["seq_len"] if kind in PACKED_FORMATS or "pairs" in facts else []),
            *(["labels"] if kind in PACKED_FORMATS and kind != CHAT else []),
        ]
        facts = {**facts, **{name: facts[name] for name in required}}
        for name, values in (facts.get("digests") or {}).items():
            if [type(values[key]) for key in ("bytes", "sample", "sha256")] != [int, str, str]:
                raise _unprepared(folder, f"its corpus.json has no digest of {name}")
    except (KeyError, TypeError, AttributeError) as error:
        raise _unprepared(folder, f"its corpus.json lacks {error}") from error
    for name, kinds in _KINDS.items():
        if name in facts and type(facts[name]) not in kinds:
            raise _unprepared(folder, f"its corpus.json has {name} {facts[name]!r}")
    readers = {split: IndexedReader(folder / split) for split, (documents, _) in counts.items() if documents}
    for split, reader in readers.items():
        if (reader.documents, reader.tokens) != counts[split]:
            counted = f"{reader.documents} documents and {reader.tokens} tokens"
            raise _unprepared(
                folder,
                (
                    f"{file_pair(folder / split)[0]} has {counted}, "
                    f"corpus.json says {counts[split][0]} and {counts[split][1]}"
                ),
            )
    return Corpus(folder, readers, facts)


def interrupted(folder: Path) -> bool:
    """Whether a `prepare` of `folder` has started and not completed."""
    return (folder / PARTIAL / PLAN).is_file() and not (folder / CORPUS).is_file()


def _facts(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        looked = "" if folder.is_absolute() else f" (looked in {Path.cwd()})"
        raise _unprepared(folder, f"there is no such folder, and no such pair of token files{looked}")
    if (folder / "corpus.json").exists():
        try:
            return read_object(folder / "corpus.json", field="data.path")
        except UserError as error:
            words = str(error).partition("\n")[0].partition(": ")[2]
            raise _unprepared(folder, f"its corpus.json cannot be read ({words})") from error
    if interrupted(folder):
        problem = "an interrupted prepare, or one still at work: it is not complete"
        raise refusal(
            "data.path",
            folder,
            problem,
            allowed="a folder that prepare completed",
            instead=prepare_command.for_folder(folder),
        )
    if pairs := sorted(folder.glob("*.idx")):
        prefix = pairs[0].with_suffix("")
        raise _unprepared(
            folder,
            (
                "it has token files but no corpus.json; "
                f"token files from elsewhere are named by their prefix: data.path={prefix}"
            ),
        )
    raise _unprepared(folder, "it holds no prepared corpus")


def _unprepared(folder: Path, problem: str) -> UserError:
    allowed = "a folder that prepare completed, or the prefix of a .bin and an .idx file"
    return refusal("data.path", folder, problem, allowed=allowed, instead=prepare_command.for_folder(folder))
