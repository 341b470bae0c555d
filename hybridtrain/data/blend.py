"""The training data: one corpus, or several in proportion to their weights.

    sample index -> block of 10,000, place in it -> keyed permutation of the block
        -> corpus and its own sample index -> row

Every block has the same number of rows of each corpus: its share, rounded by the largest remainder
method. Each corpus has its own epochs and its own order. All of this is a function of the sample
index, in constant time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from hybridtrain import registry
from hybridtrain.config.schema import Config, DataConfig
from hybridtrain.data import order, special
from hybridtrain.data.corpus import Corpus
from hybridtrain.data.pairs import PairRows
from hybridtrain.data.prepare.embedded import open_or_prepare
from hybridtrain.data.rows import Rows
from hybridtrain.data.user_rows import UserRows
from hybridtrain.errors import UserError, refusal
from hybridtrain.plan.batch import BatchPlan
from hybridtrain.runtime import log
from hybridtrain.runtime.files import read_object

_log = log.get("data")
BLOCK = 10_000
"""Rows per block. Shares of corpora are exact to 1 / BLOCK = 0.01 %."""


@dataclass(frozen=True)
class Blend:
    """One or more corpora, with their weights."""

    corpora: tuple[Corpus | UserRows, ...]
    weights: tuple[float, ...]
    """Positive; only their ratios matter."""
    evaluated: Corpus | UserRows | None
    """Corpus for evaluation instead of the held-out rows of `corpora` (data.eval_path)."""
    documents: bool
    """Documents in a row do not attend to each other (data.document_mask, or a packed corpus)."""
    continuing: np.ndarray | None = None
    """bool (V,): tokens that continue a word (task.whole_words); None: not needed."""

    def in_own_rows(self) -> Blend:
        """The blend with each text in a row of its own, not packed with others."""
        corpora = (replace(each, single=True) if isinstance(each, Corpus) else each for each in self.corpora)
        return replace(self, corpora=tuple(corpora))

    @property
    def name(self) -> str:
        return " + ".join(str(corpus.path) for corpus in self.corpora)

    @property
    def quotas(self) -> np.ndarray:
        """Rows of each corpus in a block: int64 (corpora,)."""
        return np.array(largest_remainder(BLOCK, self.weights), dtype=np.int64)

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens and their proportions; does not depend on paths."""
        return _joined([corpus.fingerprint for corpus in self.corpora], weights=self.weights)

    @property
    def sample(self) -> str | None:
        """sha256 over the samples of corpora of version 0.1; None if there are none."""
        samples = [corpus.sample for corpus in self.corpora]
        return hashlib.sha256(json.dumps(samples).encode()).hexdigest() if any(samples) else None

    def parts(self, split: str) -> list[tuple[Corpus | UserRows, float]]:
        """(corpus, weight) of the corpora that have documents in a split."""
        if split == "eval" and self.evaluated is not None:
            return [(self.evaluated, 1.0)]
        return [
            (corpus, weight)
            for corpus, weight in zip(self.corpora, self.weights, strict=True)
            if split in corpus.readers
        ]

    def count(self, split: str, *, seq_len: int) -> int:
        """Number of rows of a split in all corpora; for the train split, an epoch."""
        return sum(corpus.count(split, seq_len=seq_len) for corpus, _ in self.parts(split))

    def rows(self, split: str, *, seq_len: int, vocab: int) -> list[Rows | PairRows]:
        """The rows of each of `parts`."""
        return [
            corpus.rows(split, seq_len=seq_len, documents=self.documents, vocab=vocab)
            for corpus, _ in self.parts(split)
        ]


def data_of(config: Config, *, timeout_s: float) -> Blend:
    """The data of a config: a prepared corpus (see `open_data`), or rows registered under data.kind.

    Raises UserError.
    """
    if registry.lookup("data", config.data.kind) is None:
        blend = open_data(config.data, timeout_s=timeout_s)
        if config.task.whole_words:
            blend = dataclasses.replace(blend, continuing=_continuing(blend))
        return _as_pairs(blend) if config.task.next_sentence else blend
    result = registry.call("data", config.data.kind, config)
    rows, held_out = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    return of_rows(
        rows, held_out, fields=(f"data.kind={config.data.kind}",) * 2, documents=config.data.document_mask
    )


def _continuing(blend: Blend) -> np.ndarray:
    first = blend.corpora[0]
    if not isinstance(first, Corpus) or not first.tokenizer_dir.is_dir():
        problem, allowed = f"{blend.name} has no tokenizer, which tells words", "false with it"
        instead = "task.whole_words=false"
        raise refusal("task.whole_words", True, problem, allowed=allowed, instead=instead)
    return special.continuing(first.tokenizer_dir)


def _as_pairs(blend: Blend) -> Blend:
    """The blend with pairs of parts of text as rows.

    Raises UserError for a corpus without sentences, and options that pairs do not have.
    """
    option, value, problem = "data.path", blend.name, ""
    if not all(isinstance(corpus, Corpus) and corpus.has_pairs for corpus in blend.corpora):
        problem = "its sentences were not found: prepare it with data.sentences=true"
    elif blend.evaluated is not None:
        option, value, problem = "data.eval_path", str(blend.evaluated.path), "token files have no sentences"
    elif blend.documents:
        option, value, problem = "data.document_mask", "true", "the parts of a pair attend to each other"
    if problem:
        allowed, instead = "with task.next_sentence a corpus of data.sentences alone", "that"
        raise refusal(
            option, value, problem, allowed=allowed, instead=f"{instead}, or task.next_sentence=false"
        )
    corpora = [dataclasses.replace(each, paired=True) for each in blend.corpora if isinstance(each, Corpus)]
    return dataclasses.replace(blend, corpora=tuple(corpora))


def of_rows(rows: Any, held_out: Any, *, fields: tuple[str, str], documents: bool) -> Blend:
    """A user's rows to train on and, optionally, to evaluate on. `fields`: their names in messages.

    Raises UserError.
    """
    evaluated = None if held_out is None else UserRows(held_out, split="eval", field=fields[1])
    return Blend((UserRows(rows, split="train", field=fields[0]),), (1.0,), evaluated, documents)


def open_data(data: DataConfig, *, timeout_s: float) -> Blend:
    """Open data.path or data.blend, and data.eval_path.

    Raises UserError if they cannot be read or do not fit together. The built-in corpus is prepared if it
    does not exist yet.
    """
    corpora = (
        tuple(Corpus.open(path) for path in data.blend)
        if data.blend
        else (open_or_prepare(data, timeout_s=timeout_s),)
    )
    evaluated = Corpus.held_out(data.eval_path) if data.eval_path else None
    weights = tuple(data.blend.values()) if data.blend else (1.0,)
    blend = Blend(corpora, weights, evaluated, data.document_mask or any(corpus.packed for corpus in corpora))
    for corpus, quota in zip(corpora, blend.quotas, strict=True):
        if quota == 0:
            least = math.fsum(weights) / BLOCK
            raise refusal(
                "data.blend",
                f"{corpus.path}:{data.blend[str(corpus.path)]}",
                f"less than a row of {BLOCK:,}",
                allowed=f"weights of {least:g} or more beside the others",
                instead="a larger weight, or the blend without it",
            )
    _check_tokenizers([corpus for corpus in corpora if corpus.facts is not None])
    return blend


def _joined(fingerprints: Sequence[str], *, weights: Sequence[float]) -> str:
    if len(fingerprints) == 1:
        return fingerprints[0]
    parts = list(zip(fingerprints, largest_remainder(BLOCK, weights), strict=True))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def current_fingerprint(data: DataConfig) -> str | None:
    """`Blend.fingerprint` of data.path or data.blend as they are now; None if unknown.

    The token files need not exist.
    """
    places = [Path(path) for path in data.blend or [data.path]]
    try:
        fingerprints = [
            read_object(path / "corpus.json", field="data.path").get("fingerprint")
            if path.is_dir()
            else Corpus.open(path).fingerprint
            for path in places
        ]
    except UserError:
        return None
    known = [one for one in fingerprints if isinstance(one, str)]
    return (
        _joined(known, weights=tuple(data.blend.values()) or (1.0,))
        if len(known) == len(fingerprints)
        else None
    )


def tokenizer_dir(data: DataConfig) -> Path | None:
    """The tokenizer of the data: that of the first corpus, else the folder data.tokenizer; None
    if there is neither.
    """
    folders = [Path(path) / "tokenizer" for path in (data.blend or [data.path]) if path]
    if data.tokenizer != "train":
        path = Path(data.tokenizer)
        folders.append(path.parent if path.is_file() else path)
    return next((folder for folder in folders if folder.is_dir()), None)


def largest_remainder(total: int, weights: Sequence[float]) -> list[int]:
    """`total` divided into integers in proportion to `weights`, by the largest remainder method; the
    first wins a tie.
    """
    exact = [Fraction(weight) for weight in weights]
    shares = [total * weight / sum(exact) for weight in exact]
    parts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda number: parts[number] - shares[number])
    for number in by_remainder[: total - sum(parts)]:
        parts[number] += 1
    return parts


def sample_to_row(samples: np.ndarray, *, quotas: np.ndarray, rows: Sequence[int], seed: int) -> np.ndarray:
    """(corpus, row in it) of each sample index, int64 (n, 2).

    `quotas`: rows of each corpus per block; `rows`: in total.
    """
    if len(quotas) == 1:
        ids = order.row_ids(samples, rows=rows[0], seed=seed)
        return np.stack([np.zeros_like(ids), ids], axis=1)
    ends = np.cumsum(quotas)
    places = order.permuted(samples, size=BLOCK, key=f"hybridtrain blend {seed}")
    which = np.searchsorted(ends, places, side="right")
    own = samples // BLOCK * quotas[which] + places - (ends - quotas)[which]
    ids = np.empty(len(samples), dtype=np.int64)
    for number, count in enumerate(rows):
        chosen = which == number
        ids[chosen] = order.row_ids(own[chosen], rows=count, seed=f"{seed} of corpus {number}")
    return np.stack([which, ids], axis=1)


def order_fingerprint(blend: Blend, *, plan: BatchPlan, seed: int) -> str:
    """Hash of the token order: runs with equal fingerprints see the same tokens at the same step."""
    identity = (
        f"{blend.fingerprint} seq_len={plan.seq_len} seed={seed} global_batch_size={plan.global_batch_size}"
    )
    identity += "".join(
        f" {name}={stairs.values} in {stairs.steps}"
        for name, stairs in (("ramp", plan.ramp), ("cuts", plan.cuts))
        if stairs
    )
    return hashlib.sha256(identity.encode()).hexdigest()


def _check_tokenizers(corpora: Sequence[Corpus]) -> None:
    """Refuse corpora with different tokenizers (raises UserError). Only rank 0 compares the files."""
    for corpus in corpora[1:]:
        same = (corpus.vocab_size, corpus.eos_id) == (corpora[0].vocab_size, corpora[0].eos_id)
        if not same or (log.rank() == 0 and _tokenizer(corpus) != _tokenizer(corpora[0])):
            raise refusal(
                "data.blend",
                f"{corpus.path}",
                f"it was prepared with another tokenizer than {corpora[0].path}",
                allowed="corpora of one tokenizer",
                instead=(
                    f"hybridtrain prepare data.path={corpus.path} "
                    f"data.tokenizer={corpora[0].tokenizer_dir} prepare.overwrite=true data.source=..."
                ),
            )


def _tokenizer(corpus: Corpus) -> bytes | None:
    file = corpus.tokenizer_dir / "tokenizer.json"
    return hashlib.sha256(file.read_bytes()).digest() if file.is_file() else None
