"""Which checkpoints may go."""

from __future__ import annotations

import pytest

from dist_ft.checkpoint.manifest import Manifest
from dist_ft.checkpoint.retention import RetentionRules, deletable, retain
from dist_ft.slices import WrittenFile
from tests.helpers.manifests import make_manifest


def _manifest(step: int, attempt: int = 1, num_bytes: int = 100) -> Manifest:
    return make_manifest(step, attempt, files=(WrittenFile("slices.safetensors", num_bytes, "0"),))


def _kept(
    steps: list[int], rules: RetentionRules, ranking: tuple[int, ...] = (), held: tuple[int, ...] = ()
) -> dict[int, str]:
    manifests = [_manifest(step) for step in steps]
    of_directory = {manifest.directory: manifest.step for manifest in manifests}
    retained = retain(manifests, rules, ranking, {_manifest(step).directory for step in held})
    assert retained.num_bytes == 100 * len(retained.reasons)
    return {of_directory[directory]: reason for directory, reason in retained.reasons.items()}


@pytest.mark.parametrize(
    ("steps", "keep_last", "kept"),
    [
        ([], 2, []),
        ([10], 2, [10]),
        ([10, 20], 2, [10, 20]),
        ([10, 20, 30], 2, [20, 30]),
        ([10, 20, 30, 40], 1, [40]),
        ([30, 10, 20], 1, [30]),
        ([10, 20, 30], 5, [10, 20, 30]),
    ],
)
def test_the_last_stay(steps: list[int], keep_last: int, kept: list[int]) -> None:
    assert sorted(_kept(steps, RetentionRules(keep_last))) == kept


STEPS = [10, 20, 30, 40, 50, 60]


@pytest.mark.parametrize(
    ("rules", "ranking", "held", "kept"),
    [
        (RetentionRules(1, keep_best=1), (20, 10), (), {60: "newest", 20: "best"}),
        (RetentionRules(1, keep_best=2), (20, 99, 10, 30), (), {60: "newest", 20: "best", 10: "best"}),
        (RetentionRules(1, keep_best=2), (), (), {60: "newest"}),
        (RetentionRules(1, keep_best=0), (20,), (), {60: "newest"}),
        (RetentionRules(2, keep_every=20), (), (), {60: "newest", 50: "last", 40: "every", 20: "every"}),
        (RetentionRules(1), (), (10, 30), {60: "newest", 10: "held", 30: "held"}),
        # A limit takes the worthiest, and never what is held, the best or the newest.
        (RetentionRules(3, 2, 10, 350), (20, 10), (), {60: "newest", 20: "best", 50: "last"}),
        (RetentionRules(3, 2, 10, 450), (20, 10), (), {60: "newest", 20: "best", 50: "last", 40: "last"}),
        (RetentionRules(3, 2, 10, 550), (20, 10), (), {60: "newest", 20: "best", 50: "last", 40: "last", 10: "best"}),
        (RetentionRules(3, 2, 10, 1), (20, 10), (30,), {60: "newest", 30: "held", 20: "best"}),
    ],
)
def test_each_rule_keeps_its_own(
    rules: RetentionRules, ranking: tuple[int, ...], held: tuple[int, ...], kept: dict[int, str]
) -> None:
    assert _kept(STEPS, rules, ranking, held) == kept


def test_the_newest_and_the_best_stay_under_any_rules() -> None:
    for keep_last in range(1, 8):
        for limit in (None, 1, 100, 250):
            kept = _kept(STEPS, RetentionRules(keep_last, 1, None, limit), (30, 10))
            assert kept[60] == "newest"
            assert kept[30] == "best"


def test_a_checkpoint_too_large_for_the_rest_gives_way_to_smaller_ones() -> None:
    manifests = [_manifest(10), _manifest(20, num_bytes=900), _manifest(30)]
    retained = retain(manifests, RetentionRules(3, max_bytes=250), ())
    assert [*retained.reasons] == [manifests[2].directory, manifests[0].directory]


def test_only_what_nobody_needs_is_deletable() -> None:
    counting = [_manifest(10, 1), _manifest(20, 2), _manifest(30, 2)]
    folders = {
        "checkpoints/step-00000010-a0001": True,  # no rule keeps it
        "checkpoints/step-00000020-a0001": True,  # beyond the fork, or half written
        "checkpoints/step-00000015-a0001": False,  # superseded, and held
        "checkpoints/step-00000020-a0002": False,
        "checkpoints/step-00000025-a0002": True,  # a save that failed
        "checkpoints/step-00000030-a0002": False,
        "checkpoints/step-00000040-a0002": False,  # being written
        "checkpoints/step-00000020-a0003": False,  # a newer attempt's
        "checkpoints/.deleted-step-00000005-a0001.0a1b": True,
        "checkpoints/my-backup": False,
    }
    retained = retain(counting, RetentionRules(2), ()).reasons
    found = deletable(folders, counting, retained, attempt=2, held={"checkpoints/step-00000015-a0001"})
    assert found == [folder for folder, gone in folders.items() if gone]


def test_of_one_step_the_newer_attempt_stays() -> None:
    retained = retain([_manifest(20, 2), _manifest(20, 1)], RetentionRules(1, 1), (20,))
    assert [*retained.reasons] == [_manifest(20, 2).directory]
