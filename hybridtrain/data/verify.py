"""`hybridtrain verify CORPUS`: compares every byte of a prepared corpus with its hashes, and checks indices,
token ids and rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hybridtrain.data import digests
from hybridtrain.data.corpus import Corpus, interrupted
from hybridtrain.data.indexed import COPY_BYTES, IndexedReader, file_pair
from hybridtrain.data.prepare.packing import row_files
from hybridtrain.errors import UserError
from hybridtrain.runtime.files import read_object

SPLITS = ("train", "eval")


def verify_corpus(path: str | Path) -> list[str]:
    """The problems of a prepared folder, or of PREFIX for PREFIX.bin and PREFIX.idx, one per line; empty
    if there are none.

    Reads every byte once or twice, in a few MB of memory.
    """
    path = Path(path)
    if not path.is_dir():
        return _problems(lambda: _check_tokens(Corpus.open(path).readers["train"], largest_id=None))
    if interrupted(path):
        return _problems(lambda: Corpus.open(path))
    problems: list[str] = []
    facts: dict[str, Any] = {}
    try:
        facts = read_object(path / "corpus.json", field="data.path")
        for name, written in {**(facts.get("digests") or {}), **(facts.get("tokenizer_files") or {})}.items():
            problems += _changed(path / name, written)
        corpus = Corpus.open(path)
    except UserError as error:
        line = _first_line(error)
        return (
            [*problems, line]
            if not any(problem.partition(" ")[0] in line for problem in problems)
            else problems
        )
    except (AttributeError, KeyError, TypeError) as error:
        return [*problems, f"corpus.json is damaged ({type(error).__name__}: {error})"]
    for split, reader in corpus.readers.items():
        problems += _problems(partial(_check_tokens, reader, largest_id=corpus.largest_id))
        if corpus.packed:
            problems += _problems(partial(_check_rows, corpus, split=split))
    if not problems and corpus.digests is None and not _has_its_fingerprint(corpus):
        problems.append("its token files are not those of the fingerprint in corpus.json")
    if not corpus.tokenizer_dir.is_dir():
        problems.append("its tokenizer is missing")
    return problems


def _problems(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except UserError as error:
        return [_first_line(error)]
    return []


def _first_line(error: UserError) -> str:
    return str(error).partition("\n")[0]


def _changed(file: Path, written: dict[str, Any]) -> list[str]:
    problem = digests.difference(file, written, by="sha256", of=digests.full_hash, writer="prepare")
    return [f"{file.name} {problem}"] if problem else []


def _blocks(reader: IndexedReader) -> Iterator[np.ndarray]:
    for start in range(0, reader.tokens, COPY_BYTES):
        yield reader.read(start, min(start + COPY_BYTES, reader.tokens))


def _check_tokens(reader: IndexedReader, *, largest_id: int | None) -> None:
    for block in _blocks(reader):
        smallest, largest = int(block.min()), int(block.max())
        if smallest < 0 or (largest_id is not None and largest > largest_id):
            wrong, name = smallest if smallest < 0 else largest, reader.bin_path.name
            raise UserError(f"{name} holds token id {wrong}; the largest that prepare wrote is {largest_id}")


def _check_rows(corpus: Corpus, *, split: str) -> None:
    assert corpus.facts is not None
    seq_len = corpus.facts["seq_len"]
    corpus.count(split, seq_len=seq_len)  # opens the row index
    ids, starts = (np.load(file, mmap_mode="r") for file in row_files(corpus.path, split=split))
    if len(np.unique(ids)) != len(ids):
        raise UserError(f"{split}.rows.npy has a conversation twice")
    lengths = np.minimum(corpus.readers[split].sizes[ids].astype(np.int64), seq_len + 1)
    filled = np.diff(np.concatenate([[0], np.cumsum(lengths)])[starts])
    if filled.max(initial=0) > seq_len + 1:
        raise UserError(f"{split}.rows.npy has a row of {filled.max()} tokens, and rows have {seq_len + 1}")


def _has_its_fingerprint(corpus: Corpus) -> bool:
    """Whether the fingerprint is right, for corpora of version 0.1, which have no hash of each file.

    The fingerprint is a hash over tokenizer, sizes, tokens and loss masks.
    """
    assert corpus.facts is not None
    facts = {name: corpus.facts[name] for name in ("vocab_size", "eos_id")}
    prefixes = [
        prefix
        for split in SPLITS
        if split in corpus.readers
        for prefix in (split, *([f"{split}.loss"] if corpus.packed else []))
    ]
    digests_found = set()
    for append_eos in (True, False):
        digest = hashlib.sha256(json.dumps([facts, append_eos]).encode())
        for prefix in prefixes:
            if not prefix.endswith(".loss"):
                reader = IndexedReader(corpus.path / prefix)
                for start in range(0, reader.documents, COPY_BYTES):
                    digest.update(reader.sizes[start : start + COPY_BYTES].tobytes())
            with file_pair(corpus.path / prefix)[0].open("rb") as file:
                while block := file.read(COPY_BYTES):
                    digest.update(block)
        digests_found.add(digest.hexdigest())
    return corpus.fingerprint in digests_found
