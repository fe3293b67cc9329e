"""Applies `data.curation` and `max_rows`: one pass over all rows finds the rows to remove, and the rule of each.

It takes 24 bytes of memory per row, and 10 more per removed row; see `data/curation/near.py` for near copies. The
result depends only on the rows and their order. The rules themselves are in `data/curation/filters.py`.
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
from dist_ft.config.data_sections import DataConfig, RowSource
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
from dist_ft.data.rows.scan import BadRow, Row, is_held_out, reading_key, scan_part
from dist_ft.data.rows.texts import compared_text, record_key
from dist_ft.data.sources.listing import ListedSources
from dist_ft.data.sources.parts import Part, cut_parts
from dist_ft.layout import FORMAT_VERSION
from dist_ft.records import Record
from dist_ft.storage.store import Store

CURATION_VERSION = 1
"""Part of every key; raise it when the same rows and rules would remove other rows."""
_FEW = 5
"""Removed rows whose location is named, for each rule."""


def curate(config: Config, listed: ListedSources, store: Store) -> Curation:
    """Return the rows to remove from each training source. Without rules, no row is read.

    Args:
        config: The run config.
        listed: Files of the sources.
        store: The store of token shards, which also keeps the result.

    Raises:
        DataError: A source as a whole cannot be read.
    """
    data = config.data
    if not data.curates:
        return nothing_removed(config)
    parts = [
        cut_parts(files, data.part_bytes, source.rows) for source, files in zip(data.train, listed.train, strict=True)
    ]
    eval_sources = [*data.eval_sources.values()] if data.curation.against_eval else []
    eval_parts = [
        (source, part)
        for source, files in zip(eval_sources, listed.held_out, strict=False)
        for part in cut_parts(files, rows=source.rows)
    ]
    of_sources = [(source, part) for source, some in zip(data.train, parts, strict=True) for part in some]
    reading = [reading_key(source, part) for source, part in [*of_sources, *eval_parts]]
    decisive = [
        CURATION_VERSION, data.curation.model_dump_json(), data.group_by, data.eval_fraction,
        [(source.format, sorted(source.columns.items()), source.max_rows) for source in data.train],
        [[part.identity() for part in of_source] for of_source in [*parts, [part for _, part in eval_parts]]],
        *filter(None, reading),
    ]  # fmt: skip
    name = f"curation/{xxhash.xxh3_128_hexdigest(f'{decisive}'.encode())}.json"
    with suppress(FileNotFoundError):
        return _decode(store.read(name))
    removals = _Removals(data, parts)
    rows, held_out = _read(data, removals, parts, eval_parts)
    is_left = np.ones(len(rows), dtype=bool)
    for rule, found in _global_rules(data, rows, held_out, is_left):
        removals.remove(rule, rows, found[is_left[found]])
        is_left[found] = False
    curation = Curation(tuple(removals.close(index) for index in range(len(parts))))
    sources = [
        {
            "numbers": removed.numbers.tolist(), "rules": removed.rules.tolist(), "names": removed.names,
            "first": removed.first, "part_ends": removed.part_ends.tolist(),
        }
        for removed in curation.sources
    ]  # fmt: skip
    store.put(name, [json.dumps({"format_version": FORMAT_VERSION, "sources": sources}).encode()])
    return curation


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
    """Return the curation that removes no row."""
    return Curation(tuple(NOTHING for _ in config.data.train))


class _SeenRows:
    """Holds the source, the number, the hash of the content and the signature of each row."""

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


class _Removals:
    """Collects the rows to remove from each source, with their rules."""

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
        """Record the end of the next part: one more than the number of its last row."""
        self._part_ends[source_index].append(number)

    def remove(self, rule: str, rows: _SeenRows, indexes: Numbers) -> None:
        for source_index, number in zip(rows.sources[indexes].tolist(), rows.numbers[indexes].tolist(), strict=True):
            self.add(source_index, number, rule)

    def close(self, source_index: int) -> Removed:
        """Return the rows to remove from a source; a second reading finds the locations of the first few per rule."""
        numbers = np.frombuffer(self._numbers[source_index], dtype=np.int64)
        rules = np.frombuffer(self._rules[source_index], dtype=np.uint16)
        order = np.argsort(numbers)
        numbers, rules = numbers[order], rules[order]
        source, ends = self._data.train[source_index], self._part_ends[source_index]
        first: dict[str, list[str]] = {}
        for rule in np.unique(rules).tolist():
            found = first[self._names[rule]] = []
            named = numbers[rules == rule][:_FEW].tolist()
            for part, begin, end in zip(self._parts[source_index], [0, *ends], ends, strict=False):
                wanted = {number - begin for number in named if begin <= number < end}
                if wanted:
                    rows = islice(scan_part(part, source, self._data.group_by), max(wanted) + 1)
                    found += [row.place for number, row in enumerate(rows) if number in wanted]
        return Removed(numbers, rules, self._names, first, np.array(ends, np.int64))


def _read(
    data: DataConfig, removals: _Removals, parts: Sequence[Sequence[Part]], eval_parts: Sequence[tuple[RowSource, Part]]
) -> tuple[_SeenRows, _SeenRows]:
    """Return the training rows that the single-row rules keep, and the held-out rows if they are compared."""
    is_near_wanted, is_compared = data.curation.near is not None, data.curation.against_eval
    left, held_out = _SeenRows(is_near_wanted), _SeenRows(is_near_wanted and is_compared)
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
                    removals.add(source_index, number, rule)
                else:
                    left.add(source_index, number, row.record)
            removals.end_part(source_index, num_rows)
    for eval_source, part in eval_parts:
        for number, row in enumerate(scan_part(part, eval_source, data.group_by)):
            if isinstance(row, Row):
                held_out.add(0, number, row.record)
    return left, held_out


def _global_rules(
    data: DataConfig, rows: _SeenRows, held_out: _SeenRows, is_left: npt.NDArray[np.bool_]
) -> Iterator[tuple[str, Numbers]]:
    """Yield each rule that looks at all rows, with the rows that it removes from those in `is_left` at that time."""
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
