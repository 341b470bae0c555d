"""What the bytes of a prepared corpus depend on, besides its documents and the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hybridtrain.data.indexed import token_dtype
from hybridtrain.data.prepare.labelled import LabelRecipe


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
