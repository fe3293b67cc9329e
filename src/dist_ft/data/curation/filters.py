"""Applies the curation rules that look at one row, and records the rows that all rules removed.

`jobs/curate.py` applies the rules that look at all rows (copies, caps), in one pass. Row numbers count from 0 over
a whole source, in the order of `scan_rows`, including rows that cannot be used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from dist_ft.config.data_sections import CurationConfig, TextRule
from dist_ft.records import Record

Numbers = npt.NDArray[np.int64]
Item = TypeVar("Item")

AGAINST_EVAL, EXACT, NEAR, MAX_ROWS = "against_eval", "exact", "near", "max_rows"


def rule_names(curation: CurationConfig) -> tuple[str, ...]:
    """Return the names of all rules below `data.curation`, and of the cap; the first rule that fits removes a row."""
    return (
        "min_characters", "max_characters", "min_turns", "max_turns",
        *(f"drop.{index}" for index in range(len(curation.drop))),
        *(f"require.{index}" for index in range(len(curation.require))),
        AGAINST_EVAL, EXACT, NEAR, MAX_ROWS,
    )  # fmt: skip


def broken_rule(record: Record, curation: CurationConfig) -> str | None:
    """Return the name of the rule that removes a single row; None if the row stays."""
    texts = list(record.role_texts())
    for name, value, least, most in (
        ("characters", sum(len(text) for _, text in texts), curation.min_characters, curation.max_characters),
        ("turns", record.num_turns, curation.min_turns, curation.max_turns),
    ):
        if value is not None and least is not None and value < least:
            return f"min_{name}"
        if value is not None and most is not None and value > most:
            return f"max_{name}"
    for index, rule in enumerate(curation.drop):
        if _is_found(rule, texts):
            return f"drop.{index}"
    for index, rule in enumerate(curation.require):
        if not _is_found(rule, texts):
            return f"require.{index}"
    return None


@dataclass(frozen=True, eq=False)
class Removed:
    """Holds the rows of one source that the config removes.

    Attributes:
        numbers: Row numbers, ascending.
        rules: For each row, the index of its rule in `names`.
        names: Names of rules.
        first: Locations of the first few rows by rule.
        part_ends: For each part of the source, one more than the number of its last row.
    """

    numbers: Numbers = field(default_factory=lambda: np.zeros(0, np.int64))
    rules: npt.NDArray[np.uint16] = field(default_factory=lambda: np.zeros(0, np.uint16))
    names: tuple[str, ...] = ()
    first: Mapping[str, list[str]] = field(default_factory=dict)
    part_ends: Numbers = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def counts(self) -> dict[str, int]:
        """Returns the number of rows by rule, in the order of the rules; leaves out rules that removed none."""
        counts = np.bincount(self.rules, minlength=len(self.names)).tolist()
        return {name: count for name, count in zip(self.names, counts, strict=True) if count}

    def of_part(self, index: int) -> Numbers:
        """Return the removed rows of a part, numbered from the part's first row."""
        if not len(self.numbers):
            return self.numbers
        begin, end = (int(self.part_ends[index - 1]) if index else 0), int(self.part_ends[index])
        start, stop = np.searchsorted(self.numbers, (begin, end))
        return self.numbers[start:stop] - begin


NOTHING = Removed()


@dataclass(frozen=True, eq=False)
class Curation:
    """Holds the rows that are removed from each training source, in config order."""

    sources: tuple[Removed, ...]


def without(items: Iterable[Item], numbers: Numbers) -> Iterator[Item]:
    """Yield the items except those at `numbers`, which must ascend."""
    dropped = iter(numbers.tolist())
    following = next(dropped, None)
    for number, item in enumerate(items):
        if number == following:
            following = next(dropped, None)
        else:
            yield item


def _is_found(rule: TextRule, texts: Iterable[tuple[str, str]]) -> bool:
    # `re` keeps compiled patterns.
    return any(re.search(rule.pattern, text) for role, text in texts if rule.role in ("any", role))


def describe_removed(counts: Mapping[str, int]) -> str:
    """Return the number of removed rows by rule, such as `exact 1,000, near 12`."""
    return ", ".join(f"{rule} {count:,}" for rule, count in counts.items())
