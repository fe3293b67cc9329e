"""Rules that look at one row, and the books of what is removed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.config.data_sections import CurationConfig
from dist_ft.data.curation.filters import Removed, broken_rule, rule_names, without
from dist_ft.records import Completion, Conversation, Record


def chat(*contents: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation([{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)])


@pytest.mark.parametrize(
    ("settings", "record", "rule"),
    [
        ({}, chat("a", "b"), None),
        ({"min_characters": 3}, chat("a", "b"), "min_characters"),
        ({"min_characters": 2}, chat("a", "b"), None),
        ({"max_characters": 2}, chat("a", "b"), None),
        ({"max_characters": 1}, chat("a", "b"), "max_characters"),
        ({"max_characters": 3}, Completion("ab", "cd"), "max_characters"),
        ({"min_turns": 3}, chat("a", "b"), "min_turns"),
        ({"max_turns": 2}, chat("a", "b", "c", "d"), "max_turns"),
        ({"min_turns": 1, "max_turns": 2}, chat("a", "b"), None),
        ({"min_turns": 2}, Completion("", "text has no turns"), None),
        ({"drop": [{"pattern": "z"}, {"pattern": "(?i)as an ai"}]}, chat("x", "As an AI, no"), "drop.1"),
        ({"drop": [{"pattern": "x", "role": "assistant"}]}, chat("x", "y"), None),
        ({"drop": [{"pattern": "x", "role": "user"}]}, chat("x", "y"), "drop.0"),
        ({"drop": [{"pattern": "x", "role": "user"}]}, Completion("x", "y"), "drop.0"),
        ({"require": [{"pattern": r"\d", "role": "assistant"}]}, chat("1", "no digit"), "require.0"),
        ({"require": [{"pattern": r"\d"}, {"pattern": "q"}]}, chat("1", "x"), "require.1"),
        ({"require": [{"pattern": r"\d"}]}, chat("1", "x"), None),
        ({"min_characters": 9, "drop": [{"pattern": "a"}]}, chat("a", "b"), "min_characters"),
    ],
)
def test_a_row_goes_by_the_first_rule_it_breaks(settings: dict[str, Any], record: Record, rule: str | None) -> None:
    curation = CurationConfig.model_validate(settings)
    assert broken_rule(record, curation) == rule
    assert rule is None or rule in rule_names(curation)


@given(st.lists(st.integers()), st.sets(st.integers(0, 30)))
def test_without_leaves_out_what_stands_at_the_numbers(items: list[int], numbers: set[int]) -> None:
    left = list(without(items, np.array(sorted(numbers), np.int64)))
    assert left == [item for number, item in enumerate(items) if number not in numbers]


def removed(numbers: set[int], part_ends: list[int] | None = None) -> Removed:
    ordered = np.array(sorted(numbers), np.int64)
    rules = (ordered % 2).astype(np.uint16)
    return Removed(ordered, rules, ("exact", "near"), part_ends=np.array(part_ends or [100], np.int64))


@given(st.sets(st.integers(0, 99)), st.lists(st.integers(0, 100)))
def test_the_parts_of_a_source_hold_together_what_the_whole_holds(numbers: set[int], ends: list[int]) -> None:
    ends = [*sorted(ends), 100]
    whole, found = removed(numbers, ends), []
    for index, (first, end) in enumerate(pairwise([0, *ends])):
        of_part = whole.of_part(index)
        assert all(0 <= number < end - first for number in of_part)
        found += (of_part + first).tolist()
    assert found == sorted(numbers)
