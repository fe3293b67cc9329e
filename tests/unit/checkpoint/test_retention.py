"""Which checkpoints may go."""

from __future__ import annotations

import pytest

from dist_ft.checkpoint.manifest import Manifest
from dist_ft.checkpoint.retention import deletable, surplus
from tests.helpers.manifests import make_manifest


def _manifest(step: int, attempt: int = 1) -> Manifest:
    return make_manifest(step, attempt)


@pytest.mark.parametrize(
    ("steps", "keep_last", "gone"),
    [
        ([], 2, []),
        ([10], 2, []),
        ([10, 20], 2, []),
        ([10, 20, 30], 2, [10]),
        ([10, 20, 30, 40], 1, [10, 20, 30]),
        ([30, 10, 20], 1, [10, 20]),
        ([10, 20, 30], 5, []),
    ],
)
def test_all_but_the_last_may_go(steps: list[int], keep_last: int, gone: list[int]) -> None:
    assert [m.step for m in surplus([_manifest(step) for step in steps], keep_last)] == gone


def test_only_what_nobody_needs_is_deletable() -> None:
    counting = [_manifest(10, 1), _manifest(20, 2), _manifest(30, 2)]
    folders = {
        "checkpoints/step-00000010-a0001": True,  # surplus
        "checkpoints/step-00000020-a0001": True,  # beyond the fork, or half written
        "checkpoints/step-00000020-a0002": False,
        "checkpoints/step-00000030-a0002": False,
        "checkpoints/step-00000040-a0002": False,  # being written
        "checkpoints/step-00000040-a0003": False,  # a newer attempt's
        "checkpoints/.deleted-step-00000005-a0001.0a1b": True,
        "checkpoints/my-backup": False,
    }
    assert deletable(folders, counting, 2, attempt=2) == [folder for folder, gone in folders.items() if gone]


def test_the_newest_is_never_surplus() -> None:
    manifests = [_manifest(step) for step in range(1, 50)]
    for keep_last in range(1, 60):
        assert manifests[-1] not in surplus(manifests, keep_last)


@pytest.mark.parametrize(("best", "gone"), [(None, [10, 20]), (10, [20]), (20, [10]), (30, [10, 20]), (99, [10, 20])])
def test_the_best_stays_besides(best: int | None, gone: list[int]) -> None:
    manifests = [_manifest(step) for step in (10, 20, 30)]
    assert [m.step for m in surplus(manifests, 1, best)] == gone
    folders = [m.directory for m in manifests]
    assert deletable(folders, manifests, 1, 1, best) == [f"checkpoints/step-{step:08d}-a0001" for step in gone]


def test_of_one_step_the_newer_attempt_stays() -> None:
    assert [m.attempt for m in surplus([_manifest(20, 2), _manifest(20, 1)], 1)] == [1]
