"""Finds near copies of rows by MinHash (Broder 1997) and an LSH forest (Bawa et al. 2005).

The similarity of two texts is the Jaccard similarity of their runs of three words: the runs in both, divided by the
runs in either. `rensa` turns a text into 128 values of 16 bits (b-bit minwise hashing, Li and König 2010), 256 bytes a
row in a temporary file. The share of equal values estimates the similarity, within about 0.035. The rows are then
sorted once by each of 16 groups of these values, which puts near copies next to each other. This takes 90 bytes a row
in memory, whatever the rows hold. The same rows in the same order give the same result on every machine.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import xxhash
from rensa import RMinHash

Signatures = npt.NDArray[np.uint16]
"""[rows, NUM_VALUES]."""
Numbers = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

NUM_VALUES = 128
BYTES_PER_ROW = 2 * NUM_VALUES
_SEED = 42
_TREE_VALUES = 8
_NUM_TREES = NUM_VALUES // _TREE_VALUES
_NEIGHBOURS = 4
"""Neighbours compared on either side in the order of a tree. Several, because rows made from one template share many
values."""
_BATCH_ROWS = 256
_BATCH_WORDS = 1 << 20
_PAIRS = 1 << 15
"""Pairs compared at a time, which takes 16 MiB."""

# Scripts without spaces between words: Thai to Lao, Burmese, Khmer, kana, Han. Each character counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")
_FACTORS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)
"""One odd factor for each word of a run, so that the order of the words counts."""


class SignatureFile:
    """Collects the signatures of texts, in order."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._waiting: list[npt.NDArray[np.uint64]] = []
        self._num_waiting = 0
        self._num_rows = 0

    def add(self, text: str) -> None:
        """Append a text."""
        runs = _runs(text)
        self._waiting.append(runs)
        self._num_waiting += len(runs)
        if len(self._waiting) >= _BATCH_ROWS or self._num_waiting >= _BATCH_WORDS:
            self._flush()

    def read(self) -> Signatures:
        """Return the signatures of all texts so far, mapped into memory."""
        self._flush()
        if not self._num_rows:
            return np.zeros((0, NUM_VALUES), np.uint16)
        return np.memmap(self._file, dtype="<u2", mode="r", shape=(self._num_rows, NUM_VALUES))

    def _flush(self) -> None:
        if not self._waiting:
            return
        offsets = np.cumsum([0, *map(len, self._waiting)]).astype(np.uint64)
        flat = np.concatenate(self._waiting)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, NUM_VALUES, _SEED)
        self._file.write(np.array(matrix.to_rows(), dtype=np.uint32).astype("<u2").tobytes())
        self._file.flush()
        self._num_rows += len(self._waiting)
        self._waiting, self._num_waiting = [], 0


def find_near(signatures: Signatures, among: Numbers, threshold: float) -> tuple[Numbers, Numbers]:
    """Return the rows that are similar to an earlier row, ascending, and for each of them the first row of its group.

    Two rows belong to one group if they are similar, or if a chain of similar rows joins them.

    Args:
        signatures: Signatures of all rows.
        among: Rows to compare, ascending.
        threshold: Least similarity of near copies.
    """
    firsts = np.arange(len(among))
    for tree in range(_NUM_TREES):
        keys = _tree_keys(signatures, tree, among)
        order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal rows keep their order
        for distance in range(1, _NEIGHBOURS + 1):
            here, there = _alike(order[distance:], order[:-distance], keys, keys)
            is_near = _is_near(signatures, among[here], signatures, among[there], threshold)
            firsts = _join(firsts, here[is_near], there[is_near])
    later = np.flatnonzero(firsts != np.arange(len(firsts)))
    return among[later], among[firsts[later]]


def find_near_shared(signatures: Signatures, others: Signatures, threshold: float) -> tuple[Numbers, Numbers]:
    """Return the rows of `signatures` that are similar to a row of `others`, ascending, and one such row for each."""
    found = np.full(len(signatures), len(others))
    for tree in range(_NUM_TREES if len(signatures) and len(others) else 0):
        keys, other_keys = _tree_keys(signatures, tree), _tree_keys(others, tree)
        for rows, neighbours in _neighbours(keys, other_keys):
            here, there = _alike(rows, neighbours, keys, other_keys)
            is_near = _is_near(signatures, here, others, there, threshold)
            np.minimum.at(found, here[is_near], there[is_near])
    shared = np.flatnonzero(found < len(others))
    return shared, found[shared]


def _runs(text: str) -> npt.NDArray[np.uint64]:
    """Return a hash for each run of three words; a shorter text gives one hash."""
    words = [word.encode("utf-8", "surrogatepass") for word in _WORD.findall(text.lower())]
    hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, words), np.uint64, len(words))
    if len(hashes) < len(_FACTORS):
        hashes = np.concatenate([hashes, np.zeros(len(_FACTORS) - len(hashes), np.uint64)])
    count = len(hashes) - len(_FACTORS) + 1
    mixed = sum(hashes[i : i + count] * np.uint64(factor) for i, factor in enumerate(_FACTORS))
    mixed = np.asarray(mixed, np.uint64)
    return mixed ^ (mixed >> np.uint64(29))


def _tree_keys(signatures: Signatures, tree: int, among: Numbers | slice = slice(None)) -> Keys:
    """Return the values by which a tree sorts, packed four to a number: [rows, 2]."""
    part = signatures[among, tree * _TREE_VALUES : (tree + 1) * _TREE_VALUES]
    return np.ascontiguousarray(part).view("<u8")


def _neighbours(keys: Keys, other_keys: Keys) -> Iterator[tuple[Numbers, Numbers]]:
    """Yield pairs of a row and one of the others that are neighbours in the order of a tree."""
    both = np.concatenate([other_keys, keys])
    order = np.lexsort((both[:, 1], both[:, 0]))
    is_other = order < len(other_keys)
    rows, others = order[~is_other] - len(other_keys), order[is_other]
    places = np.cumsum(is_other)[~is_other]  # how many of the others stand before each row
    for distance in range(-_NEIGHBOURS, _NEIGHBOURS):
        index = places + distance
        is_inside = (index >= 0) & (index < len(others))
        yield rows[is_inside], others[index[is_inside]]


def _alike(here: Numbers, there: Numbers, keys: Keys, other_keys: Keys) -> tuple[Numbers, Numbers]:
    """Keep the pairs that agree in the first two sort values.

    Two in three near copies do, but hardly any other rows. The other trees find the remaining near copies.
    """
    half = np.uint64(32)
    is_alike = (keys[here, 0] >> half) == (other_keys[there, 0] >> half)
    return here[is_alike], there[is_alike]


def _is_near(
    signatures: Signatures, here: Numbers, others: Signatures, there: Numbers, threshold: float
) -> npt.NDArray[np.bool_]:
    """Return for each pair whether its rows agree in enough values."""
    is_near = np.zeros(len(here), dtype=bool)
    for start in range(0, len(here), _PAIRS):
        some = slice(start, start + _PAIRS)
        num_equal = np.count_nonzero(signatures[here[some]] == others[there[some]], axis=1)
        is_near[some] = num_equal >= threshold * NUM_VALUES
    return is_near


def _join(firsts: Numbers, here: Numbers, there: Numbers) -> Numbers:
    """Join the groups of each pair of rows; `firsts` holds the first row of the group of every row."""
    while True:
        low, high = np.minimum(firsts[here], firsts[there]), np.maximum(firsts[here], firsts[there])
        differ = low < high
        if not differ.any():
            return firsts
        np.minimum.at(firsts, high[differ], low[differ])
        while not np.array_equal(nearer := firsts[firsts], firsts):
            firsts = nearer
