"""Finds near copies of rows by MinHash (Broder 1997) and an LSH forest (Bawa et al. 2005).

How alike two texts are is the Jaccard similarity of their runs of three words: the share of all such runs of either
that both have. A text becomes 128 values of 16 bits (b-bit minwise hashing, Li and König 2010), 256 bytes a row in a
temporary file; two texts agree in about that share of them, give or take 0.035. `rensa` computes the values. Rows are
then sorted by 16 parts of them, where near copies come to lie side by side: 90 bytes a row in memory, whatever the
rows hold. The same rows in the same order give the same result on every machine.
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
"""Rows looked at on either side in the order of a tree: several, because a family of rows made from one form shares
many values."""
_BATCH_ROWS = 256
_BATCH_WORDS = 1 << 20
_PAIRS = 1 << 15
"""Pairs compared at a time, in 16 MiB."""

# Scripts that do not put spaces between words: Thai to Lao, Burmese, Khmer, kana, Han. There a character is a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")
_FACTORS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)
"""One for each word of a run, odd, so that its order counts."""


class SignatureFile:
    """Collects the signatures of texts, in order."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._waiting: list[npt.NDArray[np.uint64]] = []
        self._num_waiting = 0
        self._num_rows = 0

    def add(self, text: str) -> None:
        """Appends a text."""
        runs = _runs(text)
        self._waiting.append(runs)
        self._num_waiting += len(runs)
        if len(self._waiting) >= _BATCH_ROWS or self._num_waiting >= _BATCH_WORDS:
            self._flush()

    def read(self) -> Signatures:
        """Returns the signatures of all texts so far, mapped into memory."""
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
    """Returns the rows that are nearly an earlier one, ascending, and for each the first of its group.

    Rows are of one group when they are near to one another, or to a third one of it.

    Args:
        signatures: Of all rows.
        among: The rows that are looked at, ascending.
        threshold: Least similarity of near rows.
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
    """Returns the rows of `signatures` that are nearly one of `others`, ascending, and for each one of them."""
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
    """Returns a hash for each run of three words; of a shorter text, one."""
    words = [word.encode("utf-8", "surrogatepass") for word in _WORD.findall(text.lower())]
    hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, words), np.uint64, len(words))
    if len(hashes) < len(_FACTORS):
        hashes = np.concatenate([hashes, np.zeros(len(_FACTORS) - len(hashes), np.uint64)])
    count = len(hashes) - len(_FACTORS) + 1
    mixed = sum(hashes[i : i + count] * np.uint64(factor) for i, factor in enumerate(_FACTORS))
    mixed = np.asarray(mixed, np.uint64)
    return mixed ^ (mixed >> np.uint64(29))


def _tree_keys(signatures: Signatures, tree: int, among: Numbers | slice = slice(None)) -> Keys:
    """Returns the values by which a tree sorts, four in a number: [rows, 2]."""
    part = signatures[among, tree * _TREE_VALUES : (tree + 1) * _TREE_VALUES]
    return np.ascontiguousarray(part).view("<u8")


def _neighbours(keys: Keys, other_keys: Keys) -> Iterator[tuple[Numbers, Numbers]]:
    """Yields pairs of a row and one of the others that lie near one another in the order of a tree."""
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
    """Leaves out the pairs that differ in the two values that sort first: of near copies two in three agree in them,
    and another tree has the rest, but of other rows hardly any does."""
    half = np.uint64(32)
    is_alike = (keys[here, 0] >> half) == (other_keys[there, 0] >> half)
    return here[is_alike], there[is_alike]


def _is_near(
    signatures: Signatures, here: Numbers, others: Signatures, there: Numbers, threshold: float
) -> npt.NDArray[np.bool_]:
    """Whether the rows of each pair agree in enough values."""
    is_near = np.zeros(len(here), dtype=bool)
    for start in range(0, len(here), _PAIRS):
        some = slice(start, start + _PAIRS)
        num_equal = np.count_nonzero(signatures[here[some]] == others[there[some]], axis=1)
        is_near[some] = num_equal >= threshold * NUM_VALUES
    return is_near


def _join(firsts: Numbers, here: Numbers, there: Numbers) -> Numbers:
    """Joins the groups of the rows of each pair; `firsts` holds for every row the first row of its group."""
    while True:
        low, high = np.minimum(firsts[here], firsts[there]), np.maximum(firsts[here], firsts[there])
        differ = low < high
        if not differ.any():
            return firsts
        np.minimum.at(firsts, high[differ], low[differ])
        while not np.array_equal(nearer := firsts[firsts], firsts):
            firsts = nearer
