"""Random numbers that are functions of integers: the same on every machine and under every layout, without
a state to save.

    keys(sample indices) -> uint64 for each sample --uniform(place, purpose)--> a number in [0, 1)
"""

from __future__ import annotations

import hashlib

import numpy as np

_STEP = np.uint64(0x9E3779B97F4A7C15)  # of splitmix64: consecutive integers become far apart


def mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014): every input bit affects every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def keys(index: np.ndarray, *, name: str) -> np.ndarray:
    """A key for each index, uint64 (n,); other keys under another name."""
    digest = np.frombuffer(hashlib.blake2b(name.encode(), digest_size=8).digest(), dtype="<u8")
    return mix(mix(index.astype(np.uint64) * _STEP + digest))


def bits(keys: np.ndarray, place: np.ndarray, *, purpose: int) -> np.ndarray:
    """64 random bits for each pair of a key and a place, which broadcast, uint64; others for each purpose."""
    of_key = mix(keys + np.array([purpose + 1], dtype=np.uint64) * _STEP)
    return mix(of_key + place.astype(np.uint64) * _STEP)


def uniform(keys: np.ndarray, place: np.ndarray, *, purpose: int) -> np.ndarray:
    """Numbers in [0, 1), fp64, for pairs of a key and a place (see `bits`)."""
    return (bits(keys, place, purpose=purpose) >> np.uint64(11)) * 2.0**-53
