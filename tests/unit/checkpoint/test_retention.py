"""Which checkpoints may go."""

from __future__ import annotations

import pytest

from dist_ft.checkpoint.manifest import Fingerprint, Manifest
from dist_ft.checkpoint.retention import surplus
from dist_ft.state import Cursor


def _manifest(step: int, attempt: int = 1) -> Manifest:
    mark = Fingerprint("m", "d", 0, "full", 8)
    return Manifest("run", attempt, step, Cursor(0, step), 1, 2, step, mark, (), (), {}, {}, None)


@pytest.mark.parametrize(
    ("steps", "keep_last", "pinned", "gone"),
    [
        ([], 2, [], []),
        ([10], 2, [], []),
        ([10, 20], 2, [], []),
        ([10, 20, 30], 2, [], [10]),
        ([10, 20, 30, 40], 1, [], [10, 20, 30]),
        ([30, 10, 20], 1, [], [10, 20]),
        ([10, 20, 30, 40], 1, [20], [10, 30]),
        ([10, 20, 30], 2, [30], [10]),
        ([10, 20, 30], 5, [10], []),
    ],
)
def test_all_but_the_last_and_the_pinned_may_go(
    steps: list[int], keep_last: int, pinned: list[int], gone: list[int]
) -> None:
    assert [m.step for m in surplus([_manifest(step) for step in steps], keep_last, pinned)] == gone


def test_the_newest_is_never_surplus() -> None:
    manifests = [_manifest(step) for step in range(1, 50)]
    for keep_last in range(1, 60):
        assert manifests[-1] not in surplus(manifests, keep_last)


def test_of_one_step_the_newer_attempt_stays() -> None:
    assert [m.attempt for m in surplus([_manifest(20, 2), _manifest(20, 1)], 1)] == [1]
