"""Applies `data.curation` and `max_rows`: one pass over all rows says which are left out, and by which rule.

Memory: 24 bytes a row, a removed one 10 more; near copies take what `data/curation/near.py` says. The result
depends on the rows and their order alone. Which rule looks at what is `data/curation/filters.py`'s.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice

import numpy as np
import numpy.typing as npt
import xxhash

from dist_ft.config import Config
from dist_ft.config.data_sections import DataConfig
from dist_ft.data.curation.exact import Keys, find_repeats, find_shared
from dist_ft.data.curation.filters import (
    AGAINST_EVAL,
    EXACT,
    MAX_ROWS,
    NEAR,
    NOTHING,
    Curation,
    Numbers,
    Removed,
    broken_rule,
    rule_names,
)  # fmt: skip
from dist_ft.data.curation.near import SignatureFile, Signatures, find_near, find_near_shared
from dist_ft.data.rows.scan import BadRow, Row, is_held_out, scan_part
from dist_ft.data.rows.texts import compared_text, record_key
from dist_ft.data.sources.listing import ListedSources
from dist_ft.data.sources.parts import Part, cut_parts
from dist_ft.layout import FORMAT_VERSION
from dist_ft.records import Record
from dist_ft.storage.store import Store

CURATION_VERSION = 1
"""Raised when the same rows and rules would leave out others."""
_FEW = 5
"""Places that are named of each rule."""


def curate(config: Config, listed: ListedSources, store: Store) -> Curation:
    """Returns the rows that are left out of each training source; reads nothing where the config asks for nothing.

    Args:
        config: The run config.
        listed: Files of the sources.
        store: Where token shards are kept; the result is kept there, too.

    Raises:
        DataError: A source as a whole cannot be read.
    """
    data = config.data
    if not data.curates:
        return nothing_removed(config)
    parts = [cut_parts(files, data.part_bytes) for files in listed.train]
    held_out = cut_parts(listed.held_out) if data.curation.against_eval else []
    name = f"curation/{_key(data, [*parts, held_out])}.json"
    with suppress(FileNotFoundError):
        return _decode(store.read(name))
    curation = _curate(data, parts, held_out)
    store.put(name, [_encode(curation)])
    return curation


def _curate(data: DataConfig, parts: Sequence[Sequence[Part]], eval_parts: Sequence[Part]) -> Curation:
    books = _Books(data, parts)
    left, held_out = _read(data, books, parts, eval_parts)
    is_left = np.ones(len(left), dtype=bool)
    for rule, found in _global_rules(data, left, held_out, is_left):
        books.remove(rule, left, found[is_left[found]])
        is_left[found] = False
    return Curation(tuple(books.close(index) for index in range(len(parts))))


def _key(data: DataConfig, parts: Sequence[Sequence[Part]]) -> str:
    """Of everything that decides which rows go."""
    how = [
        CURATION_VERSION, data.curation.model_dump_json(), data.group_by, data.eval_fraction,
        [(source.format, sorted(source.columns.items()), source.max_rows) for source in data.train],
        [[part.identity() for part in of_source] for of_source in parts],
    ]  # fmt: skip
    return xxhash.xxh3_128_hexdigest(f"{how}".encode())


def _encode(curation: Curation) -> bytes:
    sources = [
        {
            "numbers": removed.numbers.tolist(), "rules": removed.rules.tolist(), "names": removed.names,
            "first": removed.first, "part_ends": removed.part_ends.tolist(),
        }
        for removed in curation.sources
    ]  # fmt: skip
    return json.dumps({"format_version": FORMAT_VERSION, "sources": sources}).encode()


def _decode(data: bytes) -> Curation:
    return Curation(
        tuple(
            Removed(
                numbers=np.array(source["numbers"], np.int64),
                rules=np.array(source["rules"], np.uint16),
                names=tuple(source["names"]),
                first=source["first"],
                part_ends=np.array(source["part_ends"], np.int64),
            )
            for source in json.loads(data)["sources"]
        )
    )


def nothing_removed(config: Config) -> Curation:
    """Returns the curation that leaves every row where it is."""
    return Curation(tuple(NOTHING for _ in config.data.train))


class _Collected:
    """What is remembered of rows: source, number, hash of what they say, signature."""

    def __init__(self, has_signatures: bool) -> None:
        self._sources, self._numbers, self._keys = array("H"), array("q"), array("Q")
        self._signatures = SignatureFile() if has_signatures else None

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, source_index: int, number: int, record: Record) -> None:
        self._sources.append(source_index)
        self._numbers.append(number)
        self._keys.append(record_key(record))
        if self._signatures is not None:
            self._signatures.add(compared_text(record))

    @property
    def sources(self) -> npt.NDArray[np.uint16]:
        return np.frombuffer(self._sources, dtype=np.uint16)

    @property
    def numbers(self) -> Numbers:
        return np.frombuffer(self._numbers, dtype=np.int64)

    @property
    def keys(self) -> Keys:
        return np.frombuffer(self._keys, dtype=np.uint64)

    def signatures(self) -> Signatures:
        assert self._signatures is not None
        return self._signatures.read()


class _Books:
    """Writes down which rows of which source go, and why."""

    def __init__(self, data: DataConfig, parts: Sequence[Sequence[Part]]) -> None:
        self._data, self._parts = data, parts
        self._names = rule_names(data.curation)
        self._part_ends: list[list[int]] = [[] for _ in data.train]
        self._numbers = [array("q") for _ in data.train]
        self._rules = [array("H") for _ in data.train]

    def add(self, source_index: int, number: int, rule: str) -> None:
        self._numbers[source_index].append(number)
        self._rules[source_index].append(self._names.index(rule))

    def end_part(self, source_index: int, number: int) -> None:
        """Notes the number behind the last row of the next part."""
        self._part_ends[source_index].append(number)

    def remove(self, rule: str, rows: _Collected, indexes: Numbers) -> None:
        for source_index, number in zip(rows.sources[indexes].tolist(), rows.numbers[indexes].tolist(), strict=True):
            self.add(source_index, number, rule)

    def close(self, source_index: int) -> Removed:
        numbers = np.frombuffer(self._numbers[source_index], dtype=np.int64)
        rules = np.frombuffer(self._rules[source_index], dtype=np.uint16)
        order = np.argsort(numbers)
        numbers, rules = numbers[order], rules[order]
        first = {
            self._names[rule]: self._places(source_index, numbers[rules == rule][:_FEW].tolist())
            for rule in np.unique(rules).tolist()
        }
        return Removed(numbers, rules, self._names, first, np.array(self._part_ends[source_index], np.int64))

    def _places(self, source_index: int, numbers: Sequence[int]) -> list[str]:
        """Returns the places of rows in a second reading of the parts in which they are."""
        source, ends = self._data.train[source_index], self._part_ends[source_index]
        found = []
        for part, begin, end in zip(self._parts[source_index], [0, *ends], ends, strict=False):
            wanted = {number - begin for number in numbers if begin <= number < end}
            if wanted:
                rows = islice(scan_part(part, source, self._data.group_by), max(wanted) + 1)
                found += [row.place for number, row in enumerate(rows) if number in wanted]
        return found


def _read(
    data: DataConfig, books: _Books, parts: Sequence[Sequence[Part]], eval_parts: Sequence[Part]
) -> tuple[_Collected, _Collected]:
    """Returns the training rows that no rule of a single row removes, and the held-out ones if they are compared."""
    is_near_wanted, is_compared = data.curation.near is not None, data.curation.against_eval
    left, held_out = _Collected(is_near_wanted), _Collected(is_near_wanted and is_compared)
    for source_index, source in enumerate(data.train):
        num_rows = 0
        for part in parts[source_index]:
            for row in scan_part(part, source, data.group_by):
                number, num_rows = num_rows, num_rows + 1
                if isinstance(row, BadRow):
                    continue
                if data.eval_fraction is not None and is_held_out(row, data.eval_fraction):
                    if is_compared:
                        held_out.add(source_index, number, row.record)
                elif (rule := broken_rule(row.record, data.curation)) is not None:
                    books.add(source_index, number, rule)
                else:
                    left.add(source_index, number, row.record)
            books.end_part(source_index, num_rows)
    for part in eval_parts:
        assert data.eval_source is not None
        for number, row in enumerate(scan_part(part, data.eval_source, data.group_by)):
            if isinstance(row, Row):
                held_out.add(0, number, row.record)
    return left, held_out


def _global_rules(
    data: DataConfig, rows: _Collected, held_out: _Collected, is_left: npt.NDArray[np.bool_]
) -> Iterator[tuple[str, Numbers]]:
    """Yields each rule that looks at all rows, and the rows it removes of those that `is_left` says are there then."""
    curation = data.curation
    if curation.against_eval:
        yield AGAINST_EVAL, find_shared(rows.keys, held_out.keys)[0]
        if curation.near is not None:
            yield AGAINST_EVAL, find_near_shared(rows.signatures(), held_out.signatures(), curation.near)[0]
    if curation.exact:
        among = np.flatnonzero(is_left)
        yield EXACT, among[find_repeats(rows.keys[among])[0]]
    if curation.near is not None:
        yield NEAR, find_near(rows.signatures(), np.flatnonzero(is_left), curation.near)[0]
    for source_index, source in enumerate(data.train):
        if source.max_rows is not None:
            of_source = np.flatnonzero(is_left & (rows.sources == source_index))
            by_hash = np.lexsort((of_source, rows.keys[of_source]))
            yield MAX_ROWS, of_source[by_hash[source.max_rows :]]
