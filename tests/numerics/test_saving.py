"""Checkpoints that are written while training goes on hold what training had at their step, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_ft.checkpoint.lineage import take_attempt
from dist_ft.storage.store import LocalStore
from tests.helpers.attempts import BODIES, Attempt, attempt_spec, differing, prepare, run_path, train
from tests.helpers.configs import tiny_config
from tests.helpers.ranks import RankError, RankServer

EVERY_STEP = {"checkpoint__every_steps": 1, "checkpoint__keep_last": 99, "train__max_steps": 10}
VARIANTS: dict[str, dict[str, Any]] = {
    "full, ZeRO 0": {"zero__stage": 0},
    "full, ZeRO 2": {"zero__stage": 2},
    "lora, ZeRO 3": {"method__kind": "lora", "zero__stage": 3},
    "full, ZeRO 1, bfloat16": {"zero__stage": 1, "model__dtype": "bfloat16"},
}


def _train(ranks: RankServer, tmp_path: Path, name: str, body: str = "train", **changes: Any) -> Attempt:
    arguments = {key: changes.pop(key) for key in ("slow_rank",) if key in changes}
    config = tiny_config(tmp_path, run__name=name, **EVERY_STEP, **changes)
    return train(ranks, config, prepared=prepare(ranks, config), body=body, **arguments)


@pytest.mark.parametrize("slow_rank", [0, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_slow_save_holds_nobody_up_and_holds_its_own_step(
    variant: str, slow_rank: int, ranks: RankServer, tmp_path: Path
) -> None:
    whole = _train(ranks, tmp_path, "whole", **VARIANTS[variant])
    slow = _train(
        ranks, tmp_path, "slow", "train_on_a_slow_disk", slow_rank=slow_rank, checkpoint__in_background=True,
        **VARIANTS[variant],
    )  # fmt: skip
    assert slow.losses == whole.losses
    skipped = slow.results[0]["skipped_saves"]
    assert skipped[:2] == [2, 3]  # one in flight, so the next two were left out, by both ranks
    assert {1, 10} <= set(slow.manifests)
    assert sorted([*slow.manifests, *skipped]) == list(range(1, 11))
    assert [step for step, manifest in slow.manifests.items() if manifest.probe is not None] == [1, 10]
    for step in slow.manifests:
        assert differing(slow.state(step), whole.state(step)) == [], f"after step {step}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_copy_that_is_made_beside_the_next_step_is_of_its_own_step(
    variant: str, ranks: RankServer, tmp_path: Path
) -> None:
    whole = _train(ranks, tmp_path, "whole", **VARIANTS[variant])
    late = _train(
        ranks, tmp_path, "late", "train_with_late_copies", checkpoint__in_background=True, **VARIANTS[variant]
    )
    assert late.losses == whole.losses
    assert {1, 10} < set(late.manifests)
    for step in late.manifests:
        assert differing(late.state(step), whole.state(step)) == [], f"after step {step}"


def _disturbed(ranks: RankServer, tmp_path: Path, failure: str) -> list[dict[str, Any]]:
    config = tiny_config(tmp_path, **EVERY_STEP, checkpoint__in_background=True)
    spec = attempt_spec(config, prepare(ranks, config), take_attempt(LocalStore(run_path(config)), None).number, None)
    return ranks.run(2, f"{BODIES}:train_on_a_broken_disk", {"attempt": spec, "failure": failure})


def test_a_run_goes_on_without_a_checkpoint_for_which_there_is_no_room(ranks: RankServer, tmp_path: Path) -> None:
    first, second = _disturbed(ranks, tmp_path, "disk")
    assert (first["failed_saves"], second["failed_saves"]) == ([], [1])
    assert first["outcome"] == second["outcome"] == "completed"


def test_an_error_that_nobody_foresaw_in_a_save_ends_the_rank(ranks: RankServer, tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"the checkpoint of step 1 could not be written: RuntimeError: nobody foresaw"):
        _disturbed(ranks, tmp_path, "bug")


@pytest.mark.parametrize("variant", ["full, ZeRO 2", "lora, ZeRO 3"])
def test_a_rank_without_memory_for_a_copy_writes_the_same_without_one(
    variant: str, ranks: RankServer, tmp_path: Path
) -> None:
    changes = {**VARIANTS[variant], "checkpoint__in_background": True}
    whole = _train(ranks, tmp_path, "whole", **changes)
    streamed = _train(ranks, tmp_path, "streamed", "train_without_memory", **changes)
    assert streamed.losses == whole.losses
    first, second = (result["streamed_saves"] for result in streamed.results)
    assert (first, {*second} >= {*streamed.manifests} - {10}) == ([], True)
    for step in {*streamed.manifests} & {*whole.manifests}:
        assert differing(streamed.state(step), whole.state(step)) == [], f"after step {step}"


def test_the_ranks_agree_on_the_steps_that_the_clock_of_rank_0_chooses(ranks: RankServer, tmp_path: Path) -> None:
    whole = _train(ranks, tmp_path, "whole")
    config = tiny_config(tmp_path, run__name="auto", **{**EVERY_STEP, "checkpoint__every_steps": "auto"})
    spec = attempt_spec(config, prepare(ranks, config), take_attempt(LocalStore(run_path(config)), None).number, None)
    first, second = ranks.run(2, f"{BODIES}:train", {"attempt": {**spec, "mtbf_s": 1e-6}})
    staged = [[entry["step"] for entry in result["staged"]] for result in (first, second)]
    assert staged[0] == staged[1]
    assert {1, 10} <= set(staged[0])  # failures are expected at once, so a checkpoint is due whenever none is written
    assert {row["step"]: row["loss"] for row in first["rows"]} == whole.losses
    assert first["intervals"][0]["mtbf_s"] == 0.0
    assert second["intervals"] == []
