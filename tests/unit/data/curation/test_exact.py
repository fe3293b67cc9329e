"""Equal rows by their hashes, against a count by hand."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.data.curation.exact import Keys, find_repeats, find_shared

KEYS = st.lists(st.sampled_from([0, 1, 2, 3, 2**63, 2**64 - 1]), max_size=12)


def as_keys(values: list[int]) -> Keys:
    return np.array(values, dtype=np.uint64)


@given(KEYS)
def test_every_row_that_repeats_an_earlier_one_is_found_with_the_first(values: list[int]) -> None:
    later, firsts = find_repeats(as_keys(values))
    expected = [(i, values.index(v)) for i, v in enumerate(values) if v in values[:i]]
    assert list(zip(later.tolist(), firsts.tolist(), strict=True)) == expected


@given(KEYS, KEYS)
def test_every_row_that_the_others_hold_is_found_with_the_first_of_them(values: list[int], others: list[int]) -> None:
    here, there = find_shared(as_keys(values), as_keys(others))
    expected = [(i, others.index(v)) for i, v in enumerate(values) if v in others]
    assert list(zip(here.tolist(), there.tolist(), strict=True)) == expected
