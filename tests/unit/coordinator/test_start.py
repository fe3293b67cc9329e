"""Which checkpoint a run may start from, and what is never deleted or taken for empty."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.checkpoint.cleaning import clean_up
from dist_ft.checkpoint.lineage import newest_number, take_attempt
from dist_ft.checkpoint.manifest import Manifest
from dist_ft.checkpoint.retention import RetentionRules
from dist_ft.coordinator.start import can_go_on, check_length, check_resume
from dist_ft.errors import UsageError
from dist_ft.slices import Cursor
from dist_ft.storage.store import LocalStore
from tests.helpers.manifests import make_manifest

BATCH = 10


def _manifest(step: int, position: int, attempt: int = 1) -> Manifest:
    return make_manifest(step, attempt, cursor=Cursor(0, position))


@pytest.mark.parametrize(
    ("step", "position", "max_steps", "num_positions", "may"),
    [
        (5, 50, 11, 105, True),
        (11, 105, 11, 105, True),
        (11, 105, 22, 210, False),  # a longer run takes a whole step there
        (11, 105, 11, 110, False),  # as many steps, but the last one is whole
        (100, 1000, 50, 500, False),  # a shorter run ends before
        (11, 110, 11, 105, False),  # a shorter run takes less there
        (50, 500, 50, 500, True),
    ],
)
def test_a_run_starts_only_where_it_would_have_passed(
    step: int, position: int, max_steps: int, num_positions: int, may: bool
) -> None:
    assert can_go_on(_manifest(step, position), BATCH, max_steps, num_positions) is may


@given(st.integers(1, 500), st.integers(1, 500))
def test_a_run_may_start_from_each_of_its_own_steps(num_positions: int, longer: int) -> None:
    steps = -(-num_positions // BATCH)
    for step in range(1, steps + 1):
        own = _manifest(step, min(step * BATCH, num_positions))
        assert can_go_on(own, BATCH, steps, num_positions)
        total = num_positions + longer
        is_whole = step * BATCH <= num_positions
        assert can_go_on(own, BATCH, -(-total // BATCH), total) is is_whole


def test_a_resume_that_fits_nowhere_names_both_lengths() -> None:
    with pytest.raises(UsageError) as caught:
        check_length([_manifest(11, 105)], BATCH, 22, 210)
    for part in ("train.max_steps", "train.epochs", "22 steps", "210 sequences", "step 11 after 105", "run.name"):
        assert part in str(caught.value)
    check_length([], BATCH, 22, 210)
    check_length([_manifest(10, 100), _manifest(11, 105)], BATCH, 22, 210)


def _commit(store: LocalStore, manifest: Manifest) -> None:
    assert store.create_exclusive(f"{manifest.directory}/manifest.json", manifest.encode())


class _Flaky(LocalStore):
    """A shared file system that fails once in a while."""

    broken = ""

    def read(self, name: str) -> bytes:
        if self.broken and self.broken in name:
            raise OSError(errno.ESTALE, "stale handle")
        return super().read(name)


def test_a_manifest_that_cannot_be_read_now_is_not_deleted(tmp_path: Path) -> None:
    store = _Flaky(tmp_path)
    take_attempt(store, None)
    old = _manifest(40, 400)
    _commit(store, old)
    take_attempt(store, old)
    _commit(store, _manifest(50, 500, attempt=2))
    store.broken = "step-00000040"
    clean_up(store, RetentionRules(2), 2)
    assert store.folders("checkpoints") == ["checkpoints/step-00000040-a0001", "checkpoints/step-00000050-a0002"]
    store.broken = ""
    clean_up(store, RetentionRules(1), 2)
    assert store.folders("checkpoints") == ["checkpoints/step-00000050-a0002"]


def test_a_deletion_that_fails_does_not_keep_the_others_from_going(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    take_attempt(store, None)
    for step in (1, 2, 3):
        _commit(store, _manifest(step, step * BATCH))
    delete: Callable[[str], None] = store.delete

    def refuse_first(prefix: str) -> None:
        if "step-00000001" in prefix:
            raise OSError(errno.EBUSY, "busy")
        delete(prefix)

    monkeypatch.setattr(store, "delete", refuse_first)
    clean_up(store, RetentionRules(1), 1)
    assert [Path(name).name for name in store.folders("checkpoints")] == ["step-00000001-a0001", "step-00000003-a0001"]


def test_a_half_deleted_folder_goes_without_a_longer_name(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    (tmp_path / "checkpoints" / ".deleted-x.1").mkdir(parents=True)
    store.delete("checkpoints/.deleted-x.1")
    assert store.folders("checkpoints") == []


def test_a_listing_that_fails_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    take_attempt(store, None)
    scandir = os.scandir

    def fail(path: Any) -> Any:
        if str(path).endswith("attempts"):
            raise OSError(errno.ESTALE, "stale handle")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(OSError, match="stale"):
        newest_number(store)


def test_a_resume_under_another_objective_is_refused_with_both() -> None:
    manifest = _manifest(4, 4 * BATCH)
    check_resume(manifest, manifest.fingerprint)
    with pytest.raises(UsageError, match=r"step 4 .*objective: checkpoint sft, config dpo"):
        check_resume(manifest, replace(manifest.fingerprint, objective="dpo"))
    assert UsageError("").exit_code == 2
