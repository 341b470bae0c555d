"""The row of each sample: a keyed permutation per epoch, computed per element, so that nothing
is stored or replayed.

    sample index -> (epoch, place) = divmod(index, rows) -> row = permutation[seed, epoch](place)

The permutation is a Feistel network on pairs (left, right) with left < a, right < b and a*b just above `rows`
(generalized to any modulus: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). The few
results above `rows` go through the network again (cycle walking), so that it is a permutation of 0..rows-1.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

ROUNDS = 8  # one 64-byte blake2b digest has 8 keys


def row_ids(samples: np.ndarray, *, rows: int, seed: int | str) -> np.ndarray:
    """Rows of the samples, int64 (n,). Each epoch visits every row once.

    Time per sample and memory do not depend on `rows`. The result is the same on every machine.
    """
    return permuted(samples, size=rows, key=f"hybridtrain rows {seed}")


def keys(samples: np.ndarray, *, pieces: int, seed: int | str) -> np.ndarray:
    """A number for each of the `pieces` of each sample, int64 (n * pieces,), the same on every machine."""
    key = _keys(f"hybridtrain samples {seed}")[0]
    of_samples = _mix(samples.astype(np.uint64) ^ key) + key
    return _mix(of_samples[:, None] + np.arange(pieces, dtype=np.uint64)).flatten().view(np.int64)


def permuted(index: np.ndarray, *, size: int, key: str) -> np.ndarray:
    """Permute each run of `size` consecutive indices by its own permutation of 0..size-1; places
    in it, int64 (n,).
    """
    assert size >= 1
    assert index.min(initial=0) >= 0
    runs, places = np.divmod(index.astype(np.uint64), np.uint64(size))
    out = np.empty(len(index), dtype=np.int64)
    for run in np.unique(runs):
        chosen = runs == run
        out[chosen] = _permute(places[chosen], size=size, keys=_keys(f"{key} {run}"))
    return out


def _keys(key: str) -> np.ndarray:
    digest = hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8")


def _permute(places: np.ndarray, *, size: int, keys: np.ndarray) -> np.ndarray:
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    result = _feistel(places, a=np.uint64(a), b=np.uint64(b), keys=keys)
    outside = np.flatnonzero(result >= size)
    while outside.size:
        result[outside] = _feistel(result[outside], a=np.uint64(a), b=np.uint64(b), keys=keys)
        outside = outside[result[outside] >= size]
    return result


def _feistel(places: np.ndarray, *, a: np.uint64, b: np.uint64, keys: np.ndarray) -> np.ndarray:
    left, right = np.divmod(places, b)
    for number, key in enumerate(keys):
        if number % 2 == 0:
            left = (left + _mix(right ^ key) % a) % a
        else:
            right = (right + _mix(left ^ key) % b) % b
    return left * b + right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014): every input bit affects every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
