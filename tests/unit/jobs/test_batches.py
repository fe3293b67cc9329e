"""Batches of prompts: the same for every number of workers, each row once, rows of like length together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dist_ft.evaluate.generate import make_batches


@given(st.lists(st.integers(0, 500), max_size=700))
def test_every_row_is_in_one_batch_and_only_the_last_of_a_window_is_short(lengths: list[int]) -> None:
    batches = make_batches(lengths)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(0 < len(batch) <= 32 for batch in batches)
    assert sum(len(batch) < 32 for batch in batches) <= 1
    for batch in batches:
        assert [lengths[row] for row in batch] == sorted(lengths[row] for row in batch)


def test_rows_that_follow_change_no_full_window() -> None:
    lengths = [(7 * row) % 50 for row in range(600)]
    assert make_batches(lengths)[:8] == make_batches(lengths[:256])
