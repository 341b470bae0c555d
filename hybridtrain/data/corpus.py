"""One corpus as training reads it: a folder that `prepare` completed, or a pair of token files of another maker.

Opening reads metadata only and writes nothing: thousands of ranks may do it on a shared disk. Torch is not needed.
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
from hybridtrain.data.prepare.folder import CORPUS, PARTIAL, PLAN
from hybridtrain.data.prepare.packing import row_files, targets
from hybridtrain.data.prepare.sources import FITTED, FORMAT, LABELLED, READABLE
from hybridtrain.data.rows import ChatRows, Rows, TextRows, count_rows
from hybridtrain.errors import UserError, refusal
from hybridtrain.runtime import log
from hybridtrain.runtime.files import read_object


@dataclass(frozen=True)
class Corpus:
    """Token files by split; a split without documents has none."""

    path: Path
    """The folder, or the prefix of two token files."""
    readers: Mapping[str, IndexedReader]
    facts: Mapping[str, Any] | None
    """corpus.json; None for token files of another maker, of which only their index is known."""

    @classmethod
    def open(cls, path: str | Path) -> Corpus:
        """Open a prepared folder, or PREFIX for PREFIX.bin and PREFIX.idx.

        Raises UserError when it is neither, or when a token file is missing, empty, truncated or of another size than
        corpus.json says. Rank 0 also reads the index, and the first rank of each machine a sample of what `prepare` wrote.
        """
        path = Path(path)
        if not path.is_dir() and any(file.is_file() for file in file_pair(path)):
            return cls(path, {"train": IndexedReader(path)}, None)._checked()
        return _prepared(path)._checked()

    @classmethod
    def held_out(cls, path: str | Path) -> Corpus:
        """PREFIX.bin and PREFIX.idx as a corpus that is evaluated on alone."""
        path = Path(path)
        return cls(path, {"eval": IndexedReader(path)}, None)._checked()

    def _checked(self) -> Corpus:
        if log.rank() == 0:
            for split, reader in self.readers.items():
                reader.check()
                if self.fitted:
                    _check_loss(reader, IndexedReader(self.path / f"{split}.loss"))
                if self.facts is None:
                    reader.check_not_zeros()
        if log.rank() == 0 or os.environ.get("LOCAL_RANK") == "0":
            for name, written in (self.digests or {}).items():
                if problem := _changed(self.path / name, written):
                    raise _unprepared(self.path, f"{name} {problem}")
        return self

    @property
    def digests(self) -> Mapping[str, Mapping[str, Any]] | None:
        """What `prepare` wrote, by file; None for files of another maker and of earlier versions."""
        return None if self.facts is None else self.facts.get("digests")

    @cached_property
    def sample(self) -> str | None:
        """sha256 over a sample of the token files of an earlier version, which kept none; None where the fingerprint covers the files."""
        if self.facts is None or self.digests is not None:
            return None
        digest = hashlib.sha256()
        for split in sorted(self.readers):
            for file in file_pair(self.path / split):
                digests.add_sample(digest, file)
        return digest.hexdigest()

    @property
    def fitted(self) -> bool:
        """Whether it holds conversations, or texts with labels, that were fitted into rows whole; else it is a stream of text."""
        return self.facts is not None and self.facts.get("kind") in FITTED

    @property
    def labels(self) -> list[str]:
        """Names of the classes that its documents are labelled with; empty: they are not."""
        return [] if self.facts is None else self.facts.get("labels", [])

    @property
    def vocab_size(self) -> int | None:
        """Entries of the tokenizer, where it is known."""
        return None if self.facts is None else self.facts["vocab_size"]

    @property
    def eos_id(self) -> int | None:
        return None if self.facts is None else self.facts["eos_id"]

    @property
    def largest_id(self) -> int | None:
        """Largest token id in the files, where it is known."""
        return None if self.facts is None else self.facts["largest_id"]

    @property
    def tokenizer_dir(self) -> Path:
        return self.path / "tokenizer"

    @cached_property
    def fingerprint(self) -> str:
        """sha256: over tokens, sizes and tokenizer, by `prepare`; of foreign files over their sizes and some of their bytes."""
        if self.facts is not None:
            return self.facts["fingerprint"]
        digest = hashlib.sha256()
        for file in file_pair(self.path):
            digests.add_sample(digest, file)
        return digest.hexdigest()

    def count(self, split: str, *, seq_len: int) -> int:
        """Rows of `seq_len` in a split; 0 for a split without documents. Raises UserError for conversations fitted to other rows."""
        if split not in self.readers:
            return 0
        return len(self._row_index(split, seq_len=seq_len)[1]) - 1 if self.fitted else count_rows(self.readers[split].tokens, seq_len=seq_len)

    def has_targets(self, split: str, *, seq_len: int) -> bool:
        """Whether any token of a split that has rows carries loss in them. Of folders of before `kept_tokens` the masks are read, up to the first."""
        if not self.fitted:
            return True
        assert self.facts is not None
        figures = self.facts["splits"][split]
        if "kept_tokens" in figures:
            return figures["loss_tokens"] > 0
        return any(part.any() for part in targets(self.path, split=split, seq_len=seq_len))

    def rows(self, split: str, *, seq_len: int, documents: bool, vocab: int) -> Rows:
        """The rows of a split that has some, for a model of `vocab` entries. `documents`: they tell where documents begin."""
        reader, check = self.readers[split], partial(self._check, split=split, vocab=vocab)
        if not self.fitted:
            return TextRows(reader, seq_len=seq_len, documents=documents, check=check)
        assert documents
        ids, starts = self._row_index(split, seq_len=seq_len)
        return ChatRows(reader, IndexedReader(self.path / f"{split}.loss"), ids=ids, starts=starts, seq_len=seq_len, check=check)

    def _row_index(self, split: str, *, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        assert self.facts is not None
        if seq_len != self.facts["seq_len"]:
            raise refusal(
                "data.seq_len",
                seq_len,
                f"the conversations of {self.path} were fitted into rows of {self.facts['seq_len']}",
                allowed=f"{self.facts['seq_len']}",
                instead=f"data.seq_len={self.facts['seq_len']}, or prepare again with data.seq_len={seq_len} prepare.overwrite=true",
            )
        try:
            ids, starts = (np.load(file, mmap_mode="r") for file in row_files(self.path, split=split))
        except Exception as error:  # a damaged header makes numpy raise whatever its parser raises
            raise _unprepared(self.path, f"its row index cannot be read ({type(error).__name__}: {error})") from error
        if problem := _row_problem(ids, starts, conversations=self.readers[split].sequences):
            raise _unprepared(self.path, f"its row index {problem}")
        return ids, starts

    def _check(self, tokens: np.ndarray, *, split: str, vocab: int) -> None:
        """Refuse token ids outside the vocabulary: they would crash in the embedding, on a GPU without a useful message."""
        smallest, largest = int(tokens.min(initial=0)), int(tokens.max(initial=0))
        if self.largest_id is not None and largest > self.largest_id:
            raise _unprepared(self.path, f"token id {largest} was read from it, but the largest that prepare wrote is {self.largest_id}; a file has changed")
        if smallest < 0 or largest >= vocab:
            raise refusal(
                "model.config.vocab_size",
                vocab,
                f"{self.readers[split].bin_path} holds token id {smallest if smallest < 0 else largest}",
                allowed=f"token ids of 0 to {vocab - 1}",
                instead="a model with the vocabulary of the tokenizer that made the file",
            )


def _row_problem(ids: np.ndarray, starts: np.ndarray, *, conversations: int) -> str:
    """What is wrong with a row index; "" for nothing."""
    if ids.dtype != np.int64 or starts.dtype != np.int64 or ids.ndim != 1 or starts.ndim != 1 or len(starts) < 2:
        return f"has arrays of {ids.dtype} {ids.shape} and {starts.dtype} {starts.shape}"
    if len(ids) > conversations or starts[0] != 0 or starts[-1] != len(ids):
        return f"is of {len(ids)} conversations, of which {starts[-1]} are in rows, and there are {conversations}"
    if log.rank() == 0 and ((np.diff(starts) < 0).any() or ids.min(initial=0) < 0 or ids.max(initial=0) >= conversations):
        return f"names conversations that are not among {conversations}, or rows backwards"
    return ""


def _check_loss(reader: IndexedReader, loss: IndexedReader) -> None:
    loss.check()
    if loss.sequences != reader.sequences or not np.array_equal(loss.sizes, reader.sizes):
        raise _unprepared(loss.idx_path.parent, f"{loss.idx_path.name} is not of the conversations of {reader.idx_path.name}")


def changed_files(folder: Path, *, written: Any) -> list[str]:
    """Which files of a prepared folder differ from what its corpus.json says of them, and how; of an earlier version's nothing is known."""
    if not isinstance(written, Mapping):
        return []
    try:
        problems = {name: _changed(folder / name, values) for name, values in written.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise _unprepared(folder, f"its corpus.json lacks {error}") from error
    return [f"{name} {problem}" for name, problem in problems.items() if problem]


def _changed(file: Path, written: Mapping[str, Any]) -> str:
    return digests.difference(file, written, by="sample", of=digests.sample_hash, writer="prepare")


_KINDS = {"vocab_size": (int,), "largest_id": (int,), "eos_id": (int, type(None)), "fingerprint": (str,), "seq_len": (int,), "kind": (str,), "labels": (list,)}


def _prepared(folder: Path) -> Corpus:
    facts = _facts(folder)
    try:
        if facts["format"] not in READABLE:
            raise _unprepared(folder, f"it has format {facts['format']}, this version reads {FORMAT}")
        counts = {split: (facts["splits"][split]["documents"], facts["splits"][split]["tokens"]) for split in ("train", "eval")}
        kind = facts.get("kind")
        required = ["vocab_size", "largest_id", "eos_id", "fingerprint", *(["seq_len"] if kind in FITTED else []), *(["labels"] if kind == LABELLED else [])]
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
            raise _unprepared(folder, f"{file_pair(folder / split)[0]} has {counted}, corpus.json says {counts[split][0]} and {counts[split][1]}")
    return Corpus(folder, readers, facts)


def interrupted(folder: Path) -> bool:
    """Whether a `prepare` began to write `folder` and has not come to its end."""
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
        problem = "an interrupted prepare, or one still at work: it has not come to its end"
        raise refusal("data.path", folder, problem, allowed="a folder that prepare completed", instead=prepare_command.for_folder(folder))
    if pairs := sorted(folder.glob("*.idx")):
        prefix = pairs[0].with_suffix("")
        raise _unprepared(folder, f"it has token files but no corpus.json; token files of another maker go by their prefix: data.path={prefix}")
    raise _unprepared(folder, "it holds no prepared corpus")


def _unprepared(folder: Path, problem: str) -> UserError:
    allowed = "a folder that prepare completed, or the prefix of a .bin and an .idx file"
    return refusal("data.path", folder, problem, allowed=allowed, instead=prepare_command.for_folder(folder))
