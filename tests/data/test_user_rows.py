"""Rows of a user's own object: what a row may be, their fingerprint, and rows that are refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import hybridtrain as ht
from hybridtrain.data.user_rows import UserRows
from tests.user_rows import SEQ, VOCAB, Numbers


def test_a_row_is_tokens_a_pair_or_a_mapping() -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict(
        {"input_ids": [[1, 2, 3], [4, 5, 6, 7]], "labels": [[-100, 2, 3], [4, 5, -100, 7]]}
    )
    given = UserRows(table, split="train", field="data")
    assert given.count("train", seq_len=8) == 2
    ids, mask = given.read(1)
    assert (ids.tolist(), mask.tolist()) == ([4, 5, 6, 7], [True, True, False, True])
    block = given.rows("train", seq_len=4, documents=True, vocab=10).gather(np.array([0, 1]))
    assert block.tokens.tolist() == [[1, 2, 3, 0, 0], [4, 5, 6, 7, 0]]
    assert block.loss_mask.tolist() == [[False, True, True, False, False], [True, True, False, True, False]]
    assert block.doc_start.tolist() == [[True, False, False, True, False], [True, False, False, False, True]]
    assert UserRows([[1, 2], [3, 4]], split="train", field="data").read(0)[0].tolist() == [1, 2]


def test_the_fingerprint_is_the_datas_own_and_its_length_or_a_sample_of_it() -> None:
    def of(data: Any) -> str:
        return UserRows(data, split="train", field="data").fingerprint

    assert of([[1, 2], [3, 4]]) == of([[1, 2], [3, 4]])
    assert (
        len({of([[1, 2], [3, 4]]), of([[1, 2], [3, 5]]), of([[1, 2]]), of([([1, 2], [0, 1]), [3, 4]])}) == 4
    )
    named, renamed, longer = Numbers(5, first=0), Numbers(5, first=0), Numbers(6, first=0)
    named.fingerprint, renamed.fingerprint, longer.fingerprint = "a", "b", "a"
    assert len({of(named), of(renamed), of(longer)}) == 3


@pytest.mark.parametrize(
    ("data", "words", "field"),
    [
        (5, "no __len__", "data=int"),
        ([], "no rows", "data=list"),
        ([[1, 2], "text"], "it is str 'text'", "data=list, row 1"),
        ([[1, 2], [0.5, 1.5]], "it is list [0.5, 1.5]", "data=list, row 1"),
        ([[1, 2], [3]], "it is list [3]", "data=list, row 1"),
        ([[1, 2], [[1, 2], [3, 4]]], "it is list [[1, 2], [3, 4]]", "data=list, row 1"),
        ([{"tokens": [1, 2]}], "it has tokens, and no input_ids", "data=list, row 0"),
        ([([1, 2], [1])], "it has 2 tokens, and its mask is list [1]", "data=list, row 0"),
        ([list(range(SEQ + 2))], f"it has {SEQ + 2} tokens, data.seq_len is {SEQ}", "data=list, row 0"),
        ([[1, VOCAB]], f"it holds token id {VOCAB}", "data=list, row 0"),
        ([[-1, 2]], "it holds token id -1", "data=list, row 0"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused_by_name(data: Any, words: str, field: str) -> None:
    def read() -> None:
        given = UserRows(data, split="train", field="data")
        given.rows("train", seq_len=SEQ, documents=False, vocab=VOCAB).gather(np.arange(len(given.table)))

    with pytest.raises(ht.UserError) as error:
        read()
    assert str(error.value).startswith(f"{field}: ")
    assert words in str(error.value)
