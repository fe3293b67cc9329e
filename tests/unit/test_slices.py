"""The cursor, slice keys, and what covers a parameter exactly once."""

from __future__ import annotations

import json
import random
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ft.slices import STATE_KINDS, ParamInfo, SliceKey, find_gaps
from dist_ft.typed_json import from_json


@pytest.mark.parametrize(("shape", "numel"), [((), 1), ((7,), 7), ((3, 4), 12), ((2, 0, 5), 0)])
def test_a_parameter_survives_json(shape: tuple[int, ...], numel: int) -> None:
    info = ParamInfo("a.weight", shape, "model.a.weight")
    assert from_json(ParamInfo, json.loads(json.dumps(asdict(info)))) == info
    assert info.numel == numel


@settings(deadline=None)
@given(st.text(), st.integers(0, 2**40), st.sampled_from(STATE_KINDS))
def test_a_slice_key_comes_back_whatever_the_name(param: str, start: int, kind: str) -> None:
    key = SliceKey(param, start, kind)
    assert SliceKey.decode(key.encode()) == key


def test_slice_keys_are_distinct() -> None:
    keys = [SliceKey(param, start, kind) for param in ("a", "a|1") for start in (0, 1) for kind in STATE_KINDS]
    assert len({key.encode() for key in keys}) == len(keys)


@pytest.mark.parametrize("text", ["", "a", "a|0", "a|0|step", "a|x|fp32", "a||fp32", "a|0|FP32"])
def test_what_is_no_slice_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        SliceKey.decode(text)


@st.composite
def partitions(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    """A size and a division of it into runs (start, length), shuffled."""
    lengths = draw(st.lists(st.integers(1, 50), min_size=1, max_size=12))
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    ranges = list(zip(starts, lengths, strict=True))
    random.Random(draw(st.integers(0, 99))).shuffle(ranges)
    return sum(lengths), ranges


@settings(deadline=None)
@given(partitions())
def test_a_partition_has_no_gaps(case: tuple[int, list[tuple[int, int]]]) -> None:
    numel, ranges = case
    assert find_gaps(numel, ranges) is None


@settings(deadline=None)
@given(partitions(), st.data())
def test_a_lost_run_is_missing(case: tuple[int, list[tuple[int, int]]], data: st.DataObject) -> None:
    numel, ranges = case
    start, length = ranges.pop(data.draw(st.integers(0, len(ranges) - 1)))
    assert find_gaps(numel, ranges) == f"elements {start}..{start + length - 1} are missing"


@settings(deadline=None)
@given(partitions(), st.data())
def test_a_doubled_element_is_named(case: tuple[int, list[tuple[int, int]]], data: st.DataObject) -> None:
    numel, ranges = case
    element = data.draw(st.integers(0, numel - 1))
    # A run of its own, so what is reported is that element or the part of its run that then stands doubled.
    assert "stored twice" in (find_gaps(numel, [*ranges, (element, 1)]) or "")


@pytest.mark.parametrize(
    ("numel", "ranges", "problem"),
    [
        (0, [], None),
        (5, [], "elements 0..4 are missing"),
        (5, [(0, 5)], None),
        (5, [(0, 0), (0, 5), (5, 0)], None),
        (5, [(0, 6)], "6 elements stored of 5"),
        (5, [(0, 3), (2, 3)], "elements 2..2 are stored twice"),
        (5, [(0, 5), (0, 5)], "elements 0..4 are stored twice"),
        (5, [(0, 5), (1, 2)], "elements 1..2 are stored twice"),
        (5, [(1, 4)], "elements 0..0 are missing"),
        (5, [(0, 2), (3, 2)], "elements 2..2 are missing"),
    ],
)
def test_gaps_are_named_by_element(numel: int, ranges: list[tuple[int, int]], problem: str | None) -> None:
    assert find_gaps(numel, ranges) == problem
