"""The order of rows: a permutation per epoch, keyed, the same for ever."""

import time

import numpy as np
import pytest

from hybridtrain.data import order
from hybridtrain.runtime import hashing

GOLDEN_SMALL = [5, 4, 1, 0, 3, 6, 2, 5, 0, 3, 6, 1]
GOLDEN_LARGE = [995553939, 989793308, 443601658, 787943276, 432860186, 192390900]


def row_ids(first: int, count: int, *, rows: int, seed: int) -> np.ndarray:
    return order.row_ids(np.arange(first, first + count), rows=rows, seed=seed)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 16, 17, 100, 1000, 4096, 4097, 65537])
def test_each_epoch_visits_every_row_once(rows):
    for epoch in (0, 1, 5):
        assert np.array_equal(np.sort(row_ids(epoch * rows, rows, rows=rows, seed=3)), np.arange(rows))


def test_any_window_is_a_cut_of_the_sequence():
    whole = row_ids(0, 700, rows=100, seed=1)
    for first, count in [(0, 1), (99, 2), (150, 0), (37, 463), (699, 1)]:
        assert np.array_equal(row_ids(first, count, rows=100, seed=1), whole[first : first + count])


def test_epochs_and_seeds_differ():
    orders = [row_ids(epoch * 1000, 1000, rows=1000, seed=seed) for epoch in range(3) for seed in range(3)]
    for number, one in enumerate(orders):
        for other in orders[:number]:
            assert np.mean(one == other) < 0.01  # a random pair agrees in one place of 1000
    assert np.mean(orders[0] == np.arange(1000)) < 0.01


def test_order_never_changes():
    """A resumed run relies on these values: changing them changes what every checkpoint means."""
    assert row_ids(0, 12, rows=7, seed=0).tolist() == GOLDEN_SMALL
    assert row_ids(10**12, 6, rows=10**9 + 7, seed=1234).tolist() == GOLDEN_LARGE


def test_keys_never_change_either_and_are_all_different():
    """Of dropout and masked tokens: a resumed run goes on with the same elements."""
    golden = [507941490450824902, 13005867554501759431, 6762908709135304376]
    assert hashing.keys(np.arange(3), name="hybridtrain samples 7").tolist() == golden
    some = [hashing.keys(np.arange(2000), name=f"hybridtrain samples {seed}") for seed in (7, 8)]
    pieces = hashing.bits(np.concatenate(some)[:, None], np.arange(4), purpose=0)
    assert len(set(np.concatenate([*some, pieces.flatten()]).tolist())) == 2 * 2000 * 5


@pytest.mark.parametrize("rows", [2, 3, 7, 20])
def test_every_row_is_equally_likely_in_every_place(rows):
    epochs = 4000
    orders = row_ids(0, rows * epochs, rows=rows, seed=11).reshape(epochs, rows)
    counts = np.stack([np.bincount(orders[:, place], minlength=rows) for place in range(rows)])
    expected = epochs / rows
    chi_square = ((counts - expected) ** 2 / expected).sum()
    degrees = (rows - 1) ** 2
    assert chi_square < degrees + 4 * np.sqrt(2 * degrees)


def test_neighbours_are_spread():
    """Steps between consecutive samples look like those of random rows: mean distance a
    third of the range."""
    rows = row_ids(0, 20000, rows=100003, seed=5).astype(float)
    assert abs(np.abs(np.diff(rows)).mean() / 100003 - 1 / 3) < 0.01
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.03


def test_cost_does_not_depend_on_rows():
    start = time.perf_counter()
    ids = row_ids(7 * 10**14 + 100, 4096, rows=10**14 + 1, seed=0)
    assert time.perf_counter() - start < 1  # measured 2 ms; a table of 10^14 rows could not even be allocated
    assert len(np.unique(ids)) == 4096
    assert ids.min() >= 0
    assert ids.max() > 9 * 10**13
