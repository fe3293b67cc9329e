"""Retention: which checkpoint folders stay while a run goes on over attempts and drivers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_ft.checkpoint.holds import add_tag, remove_tag
from dist_ft.checkpoint.lineage import committed
from dist_ft.layout import slices_name
from dist_ft.messages import (
    EvalDone,
)
from dist_ft.metric_rows import EvalRow
from dist_ft.run.place import open_run
from tests.helpers.simulated_run import SimulatedRun, full_disk

STEERED = {"every_steps": 10, "best_metric": "eval_loss", "early_stopping": {"patience": 2}}


@pytest.mark.parametrize(
    ("losses", "kept"),
    [([3.0, 2.0, 1.0, 0.5], [40]), ([1.0, 2.0, 3.0, 4.0], [10, 40]), ([3.0, 2.0, None, 2.0], [20, 40])],
)
def test_the_best_checkpoint_stays_also_under_another_driver(
    tmp_path: Path, losses: list[float | None], kept: list[int]
) -> None:
    run = SimulatedRun(open_run(tmp_path / "run"), keep_last=1, evaluation=STEERED)
    run.open()
    for index, loss in enumerate(losses):
        if index == 2:
            run.restart()
            run.open()
        step = 10 * (index + 1)
        run.send(0, EvalDone(EvalRow(step, run.spec.attempt, {"eval_loss": loss})))
        run.commit(step)
    assert [m.step for m in committed(run.store)] == kept
    assert len(run.directories) == len(kept)


def test_a_step_that_was_measured_and_not_saved_is_not_the_best_checkpoint(tmp_path: Path) -> None:
    run = SimulatedRun(open_run(tmp_path / "run"), keep_last=1, evaluation=STEERED)
    run.open()
    for step, loss in [(10, 3.0), (20, 1.0), (30, 4.0)]:
        run.send(0, EvalDone(EvalRow(step, 1, {"eval_loss": loss})))
        if step == 20:
            run.send(0, full_disk(0, step))
        else:
            run.commit(step)
    assert [m.step for m in committed(run.store)] == [10, 30]


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_the_last_checkpoints_are_kept(tmp_path: Path, keep_last: int) -> None:
    run = SimulatedRun(open_run(tmp_path / "run"), keep_last)
    run.open()
    for step in (10, 20, 30, 40):
        run.commit(step)
    kept = [10, 20, 30, 40][-keep_last:]
    assert [m.step for m in committed(run.store)] == kept
    assert run.directories == [f"step-{step:08d}-a0001" for step in kept]


def test_retention_goes_on_over_attempts(run: SimulatedRun) -> None:
    run.open()
    run.commit(10)
    run.commit(20)
    run.open()
    run.commit(30)
    assert run.directories == ["step-00000020-a0001", "step-00000030-a0002"]


def test_a_clean_up_that_fails_does_not_disturb_the_run(run: SimulatedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run.open()
    run.commit(10)
    run.commit(20)

    def busy(*args: Any) -> None:
        raise OSError(16, "Device or resource busy")  # NFS, a file still open elsewhere

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", busy)
        assert run.commit(30).committed_step == 30
    assert run.coordinator.outcome() is None


def test_what_a_dead_attempt_left_half_written_goes_too(run: SimulatedRun) -> None:
    run.open()
    run.commit(10)
    run.stage(0, 20)  # and then the machine died
    run.open()
    for step in (20, 30, 40):
        run.commit(step)
    assert run.directories == ["step-00000030-a0002", "step-00000040-a0002"]


def test_what_killed_ranks_were_writing_goes_too(run: SimulatedRun) -> None:
    run.open()
    run.commit(10)
    folder = run.dir.checkpoint(20, 1)
    folder.mkdir()
    (folder / ".slices-00000-of-00002.safetensors.0a1b2c3d").write_bytes(bytes(1000))
    run.open()
    run.commit(20)
    run.commit(30)
    assert run.directories == ["step-00000020-a0002", "step-00000030-a0002"]


def test_what_a_newer_attempt_is_writing_stays(run: SimulatedRun) -> None:
    run.open()
    run.commit(10)
    # A newer driver has begun between the look for it and the clean-up.
    newer = run.dir.checkpoint(20, 2) / slices_name(0, 2)
    newer.parent.mkdir()
    newer.write_bytes(b"staged")
    run.commit(20)
    assert newer.exists()


def test_a_checkpoint_that_no_longer_counts_goes_too(run: SimulatedRun) -> None:
    run.open()
    run.commit(10)
    run.commit(20)
    run.damage(20, 1)
    run.open()
    for step in (20, 30, 40):
        run.commit(step)
    assert run.directories == ["step-00000030-a0002", "step-00000040-a0002"]


def test_a_disk_budget_too_small_for_the_newest_is_said_once_an_attempt(run: SimulatedRun) -> None:
    run.checkpoint = {"max_gib": 1e-9}
    run.restart()
    run.open()
    for step in (10, 20, 30):
        run.commit(step)
    assert run.directories == ["step-00000030-a0001"]
    (said,) = run.events("over_budget")
    assert said["step"] == 10
    assert said["num_bytes"] > said["max_bytes"] == 1


def test_every_k_th_the_best_two_and_a_tag_stay(run: SimulatedRun) -> None:
    run.checkpoint = {"keep_last": 1, "keep_best": 2, "keep_every": 20}
    run.evaluation = {"every_steps": 10, "best_metric": "eval_loss"}
    run.restart()
    run.open()
    for step, loss in ((10, 1.0), (20, 5.0), (30, 0.5), (40, 4.0), (50, 3.0), (60, 3.0)):
        run.send(0, EvalDone(EvalRow(step, 1, {"eval_loss": loss})))
        run.commit(step)
        if step == 50:
            add_tag(run.store, "five", "checkpoints/step-00000050-a0001", has_ended=False)
    assert [m.step for m in committed(run.store)] == [10, 20, 30, 40, 50, 60]
    remove_tag(run.store, "five")
    run.open()
    run.commit(60)
    assert [m.step for m in committed(run.store)] == [10, 20, 30, 40, 60, 60]
    assert run.directories[-1] == "step-00000060-a0002"


def test_a_save_that_failed_leaves_nothing_once_the_next_one_is_committed(run: SimulatedRun) -> None:
    run.open()
    run.stage(0, 10)
    run.send(1, full_disk(1, 10))
    run.commit(20)
    assert run.directories == ["step-00000020-a0001"]
