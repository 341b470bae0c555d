"""The settings that determine the bytes of a prepared corpus, apart from its documents and the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hybridtrain.config.schema import DataConfig
from hybridtrain.data.indexed import token_dtype
from hybridtrain.data.prepare.labelled import LabelRecipe
from hybridtrain.data.prepare.sources import ANSWERS, LABELLED, LABELLED_WORDS
from hybridtrain.types import ANSWER_ENDS


def labels_of(data: DataConfig) -> LabelRecipe | None:
    """How texts with labels become tokens; None for other formats. The classes of answers are the rows of the
    head that finds them.
    """
    if data.format not in (LABELLED, LABELLED_WORDS, ANSWERS):
        return None
    names = list(ANSWER_ENDS) if data.format == ANSWERS else data.labels
    return LabelRecipe(names, data.label_key, data.seq_len, data.format)


@dataclass(frozen=True)
class ChatRecipe:
    """How conversations are tokenized."""

    tokenizer: str
    """The user's name for it, for error messages."""
    turns: str
    """data.chat_turns."""
    seq_len: int
    """Longer conversations are truncated."""


@dataclass(frozen=True)
class Recipe:
    """The settings that determine the bytes of a piece, apart from its units and the tokenizer."""

    chat: ChatRecipe | None
    """For conversations."""
    labels: LabelRecipe | None
    """For labelled texts. Both None: documents are plain text."""
    sentences: bool
    """Whether to mark where the sentences of a text begin."""
    eval_fraction: float
    deduplicate: bool
    skip_bad: bool
    total_bytes: int
    """Approximate bytes of text of the corpus: blocks of a record that is a large part of it are held
    out; 0: of none."""
    held_out_before: Mapping[str, str]
    """Digest of a record -> how an earlier `prepare` of the folder held out its blocks."""
    eos: list[int]
    """Ids appended to each document."""
    special_ids: list[int]
    """Ids of special tokens, to count documents of text that contain them."""
    vocab_size: int

    @property
    def dtype(self) -> np.dtype:
        return token_dtype(self.vocab_size)

    @property
    def packed(self) -> ChatRecipe | LabelRecipe | None:
        """The recipe of documents that are packed whole into rows, with a loss mask; None: text."""
        return self.chat or self.labels

    @property
    def marks(self) -> str:
        """Name of the files with a mark for each token; empty if there are none."""
        return "loss" if self.packed else "sentences" if self.sentences else ""
