"""Computes seeded permutations and hashes of whole arrays, which shuffle the data. Pure, the same on every machine.

It uses only 64-bit integer arithmetic of NumPy arrays, which wraps and is exact everywhere. It uses no random
generator, because the stream of a generator could change from one release to the next.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

_GOLDEN = 0x9E3779B97F4A7C15
_NUM_ROUNDS = 4
_BLOCK = 1 << 14
"""Values computed at a time; a block that fits a core's cache is several times faster."""


def absorb(state: Words, values: Ints | int) -> Words:
    """Return the state after hashing values into it: one step of SplitMix64 (Steele et al. 2014). Shapes broadcast."""
    mixed = (state ^ np.atleast_1d(np.asarray(values)).astype(np.uint64)) + np.uint64(_GOLDEN)
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def hash_of(*values: int) -> Words:
    """Return the hash of some integers, as an array of one element."""
    state = np.zeros(1, np.uint64)
    for value in values:
        state = absorb(state, value)
    return state


def permute(indexes: Ints, sizes: Ints | int, keys: Words) -> Ints:
    """Return the images of indexes under seeded permutations, without storing a permutation.

    A four-round Feistel network (Luby and Rackoff 1988) over the next power of two, walked until the value falls
    below the size (Black and Rogaway 2002, cycle walking: less than two rounds of walking on average).

    Args:
        indexes: Each in `range(size)`.
        sizes: Size of each permutation, or of the only one.
        keys: Key of each permutation, or of the only one.
    """
    limits = np.atleast_1d(np.asarray(sizes, np.int64)).astype(np.uint64)
    # The exponent of a float is the bit length, exactly, up to 2**53.
    bits = np.maximum(np.frexp((limits - np.uint64(1)).astype(np.float64))[1], 2).astype(np.uint64)
    values = indexes.astype(np.uint64)
    for start in range(0, len(values), _BLOCK):
        block = slice(start, start + _BLOCK)
        values[block] = _walk(values[block], _some(limits, block), _some(bits, block), _some(keys, block))
    return values.astype(np.int64)


def _walk(values: Words, limits: Words, bits: Words, keys: Words) -> Words:
    places = _feistel(values, bits, keys)
    outside = np.flatnonzero(places >= limits)
    while len(outside):
        walked = _feistel(places[outside], _some(bits, outside), _some(keys, outside))
        places[outside] = walked
        outside = outside[walked >= _some(limits, outside)]
    return places


def _some(values: Words, places: Ints | slice) -> Words:
    """Return the values at some places; an array of one value holds for all places."""
    some: Words = values if len(values) == 1 else values[places]
    return some


def _feistel(values: Words, bits: Words, keys: Words) -> Words:
    """Permutes `range(2**bits)`, for bits from 2 to 64."""
    num_low = bits >> np.uint64(1)
    num_high = bits - num_low
    high = values >> num_low
    low = values ^ high << num_low
    top_of_high, top_of_low = np.uint64(64) - num_high, np.uint64(64) - num_low
    for pair in range(_NUM_ROUNDS // 2):
        high ^= _round(low, keys, 2 * pair) >> top_of_high
        low ^= _round(high, keys, 2 * pair + 1) >> top_of_low
    joined: Words = high << num_low | low
    return joined


def _round(half: Words, keys: Words, number: int) -> Words:
    """Hashes a half; only the upper bits of the result are well mixed."""
    mixed = half * np.uint64(0xFF51AFD7ED558CCD)
    mixed += keys
    mixed += np.uint64((number * _GOLDEN) % (1 << 64))
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0xC4CEB9FE1A85EC53)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(_GOLDEN)
    return mixed
