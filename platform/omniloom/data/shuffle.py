"""A permutation of any length that takes no memory: what stands at a place is computed, not looked up."""

import numpy as np

GOLDEN, FIRST, SECOND = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
TURNS = np.arange(1, 7, dtype=np.uint64) * GOLDEN
S27, S30, S31 = (np.uint64(s) for s in (27, 30, 31))


def mix(value: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser of uint64 values: each bit of the result hangs on every bit of the value."""
    value = (value ^ (value >> S30)) * FIRST
    value = (value ^ (value >> S27)) * SECOND
    return value ^ (value >> S31)


def shuffled(places: np.ndarray, length: int, *key: int | np.ndarray) -> np.ndarray:
    """What stands at `places` of the permutation of 0 … length − 1 that `key` names, int64; a key may differ by place.

    A Feistel network over the next power of four, walked until its value lies inside. Source: Black and Rogaway,
    Ciphers with Arbitrary Finite Domains (2002), section 3, cycle-walking.
    """
    secret = np.zeros(len(places), np.uint64)
    for part in key:
        secret = mix((secret ^ np.asarray(part, np.uint64)) + GOLDEN)
    half = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
    values = _feistel(places.astype(np.uint64), half, secret)
    outside = np.flatnonzero(values >= length)
    while len(outside):
        values[outside] = _feistel(values[outside], half, secret[outside])
        outside = outside[values[outside] >= length]
    return values.astype(np.int64)


def _feistel(value: np.ndarray, half: np.uint64, secret: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for turn in TURNS:
        left, right = right, left ^ (mix(right ^ (secret + turn)) & mask)
    return (left << half) | right
