"""Which checkpoint is exported next, under which name, and which exports may go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_ft.checkpoint.manifest import Manifest
from dist_ft.config import Config
from dist_ft.layout import RunDir
from dist_ft.run.events import Committed, Exported
from dist_ft.run.exports import (
    Export,
    find_exports,
    folder_of,
    missed_exports,
    name_for,
    next_export,
    surplus_exports,
)
from tests.helpers.manifests import make_manifest
from tests.helpers.simulated_run import run_config

RUN = RunDir(Path("/runs/demo"))


def config(**export: Any) -> Config:
    values = run_config().model_dump(mode="json")
    return Config.model_validate({**values, "export": export})


def export(step: int, attempt: int = 1, name: str = "") -> Export:
    return Export(step, make_manifest(step, attempt).directory, name or RUN.export_name(step))


MANIFESTS = [make_manifest(step) for step in (10, 20, 30, 40)]


def order(wanted: dict[str, Any], ranking: tuple[int, ...] = ()) -> list[int]:
    """The steps in the order in which they are exported, if nothing else is committed."""
    done: set[str] = set()
    found: list[int] = []
    while (manifest := next_export(config(**wanted), MANIFESTS, done, ranking)) is not None:
        done.add(manifest.directory)
        found.append(manifest.step)
    return found


@pytest.mark.parametrize(
    ("wanted", "ranking", "steps"),
    [
        ({}, (20,), []),
        ({"latest": True}, (), [40]),
        ({"every_steps": 20}, (), [20, 40]),
        ({"best": True}, (99, 20, 10), [20]),
        ({"best": True}, (), []),
        ({"best": True, "every_steps": 10, "latest": True}, (30,), [30, 10, 20, 40]),
    ],
)
def test_the_best_comes_first_then_those_due_then_the_newest(
    wanted: dict[str, Any], ranking: tuple[int, ...], steps: list[int]
) -> None:
    assert order(wanted, ranking) == steps


def test_a_step_whose_checkpoint_went_before_its_turn_is_missed() -> None:
    assert missed_exports(20, {10, 20, 30, 40, 60}, known={40}) == [20, 60]
    assert missed_exports(None, {20}, known=set()) == []


def test_what_latest_and_best_left_behind_goes_but_for_the_two_newest() -> None:
    exports = [export(step) for step in (10, 20, 30, 40, 50, 60)]
    pointed = {RUN.export_name(20), RUN.export_name(60)}
    assert surplus_exports(config(latest=True), exports, pointed) == [RUN.export_name(10), RUN.export_name(30)]
    assert surplus_exports(config(latest=True, every_steps=30), exports, pointed) == [RUN.export_name(10)]
    assert surplus_exports(config(), exports[:2], set()) == []


def test_an_export_counts_once_the_ledger_has_it_and_it_is_there() -> None:
    first, second = make_manifest(10).directory, make_manifest(10, 2).directory
    events = [
        Exported(10, first),
        Committed(20),
        Exported(20, make_manifest(20).directory, "exports/step-00000020-a0001"),
        Exported(10, second, "exports/step-00000010"),  # written anew after a fork
        Exported(30, make_manifest(30).directory),  # somebody has deleted it
    ]
    found = find_exports(RUN, events, ["exports/step-00000010", "exports/step-00000020-a0001", "exports/step-00000099"])
    assert folder_of(found) == {
        make_manifest(20).directory: "exports/step-00000020-a0001", second: "exports/step-00000010",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("exports", "pointed", "name"),
    [
        ([], set(), "exports/step-00000040"),
        ([export(40, 1)], set(), "exports/step-00000040"),
        ([export(40, 1)], {"exports/step-00000040"}, "exports/step-00000040-a0002"),
        ([export(40, 2)], {"exports/step-00000040"}, "exports/step-00000040"),
        ([], {"exports/step-00000040"}, "exports/step-00000040-a0002"),
    ],
)
def test_what_a_name_points_at_is_never_written_anew(exports: list[Export], pointed: set[str], name: str) -> None:
    manifest: Manifest = make_manifest(40, 2)
    assert name_for(RUN, manifest, exports, pointed) == name
