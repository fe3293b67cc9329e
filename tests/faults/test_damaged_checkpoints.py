"""Every file of the newest checkpoint damaged in turn: found, the previous one used, said loudly."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dist_ft.checkpoint.consolidate import consolidate
from dist_ft.checkpoint.lineage import committed, read_attempts
from dist_ft.checkpoint.manifest import MANIFEST, Manifest
from dist_ft.config import Config, dump_yaml
from dist_ft.coordinator.core import Coordinator
from dist_ft.errors import CheckpointError
from dist_ft.layout import slices_name
from dist_ft.orchestrate.workers.processes import run_task
from dist_ft.run.attempt_spec import AttemptSpec
from dist_ft.run.place import Run, open_run
from dist_ft.run.run_inputs import RunInputs
from dist_ft.run.state import RunRecord
from dist_ft.storage.publish import read_json
from dist_ft.storage.store import LocalStore
from tests.helpers.configs import tiny_config
from tests.helpers.group import Group, run_group
from tests.helpers.rows import last_rows, read_rows

WORLD_SIZE = 2
SLICES = [slices_name(rank, WORLD_SIZE) for rank in range(WORLD_SIZE)]
NEWEST, PREVIOUS = 4, 2


# Damages --------------------------------------------------------------------


def flip_first(path: Path) -> None:
    """Flips a bit of the first byte: the header's length, or the manifest's brace."""
    _flip(path, 0)


def flip_payload(path: Path) -> None:
    """Flips a bit in the middle of the data; in a manifest in a digit, so that it still parses."""
    if path.name == MANIFEST:
        flip_digit(path, r'"position": (\d)')
    else:
        _flip(path, path.stat().st_size // 2)


def cut_one_byte(path: Path) -> None:
    """Cuts the last byte off."""
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


def empty(path: Path) -> None:
    """Leaves a file of no bytes."""
    path.write_bytes(b"")


def flip_digit(path: Path, pattern: str) -> None:
    """Flips the lowest bit of the one byte in the pattern's group: a digit stays a digit, a letter a letter."""
    match = re.search(pattern.encode(), path.read_bytes())
    assert match is not None, f"{pattern} is not in {path}"
    assert match.end(1) - match.start(1) == 1
    _flip(path, match.start(1))


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "bit flipped in the first byte": flip_first,
    "bit flipped in the payload": flip_payload,
    "cut by one byte": cut_one_byte,
    "empty": empty,
    "removed": Path.unlink,
}
CASES = [
    pytest.param(name, damage, id=f"{name}-{damage}".replace(" ", "_"))
    for name in (*SLICES, MANIFEST)
    for damage in DAMAGES
]


# The run that is damaged ----------------------------------------------------


@dataclass(frozen=True)
class Made:
    """A run of six steps that was cut off after the commit of step 4, and how it ends undisturbed."""

    base: Path
    config: Config
    prepared: RunInputs
    dir: Run
    undisturbed: Group

    def copy(self, tmp_path: Path) -> Damaged:
        """Returns a run of its own with the same contents."""
        config = tiny_config(self.base, **CHANGES, run__name="t", run__output_dir=str(tmp_path))
        shutil.copytree(self.dir.path, tmp_path / "t")
        return Damaged(config, self.prepared, open_run(tmp_path / "t"))


@dataclass(frozen=True)
class Damaged:
    """A copy to be damaged."""

    config: Config
    prepared: RunInputs
    dir: Run

    def open(self) -> AttemptSpec:
        """Opens the next attempt, as the coordinator of a resuming driver does."""
        record = RunRecord(self.config.run.name, attempt=read_json(self.dir.run_json)["attempt"], max_steps=6)
        return Coordinator(self.config, self.dir, record, self.prepared).open_attempt(WORLD_SIZE, time.monotonic())

    def file(self, step: int, name: str, attempt: int = 1) -> Path:
        return self.dir.checkpoint(step, attempt) / name

    @property
    def events(self) -> list[dict[str, Any]]:
        return [entry for entry in read_rows(self.dir.ledger) if entry["event"] == "checkpoint_damaged"]

    def contents(self) -> dict[str, bytes]:
        """Every file that the coordinator does not append to; the story follows the ledger."""
        changing = {self.dir.ledger, self.dir.run_json, self.dir.story}
        files = (path for path in self.dir.path.rglob("*") if path.is_file() and path not in changing)
        return {path.relative_to(self.dir.path).as_posix(): path.read_bytes() for path in files}


CHANGES: dict[str, Any] = {"checkpoint__every_steps": 2, "checkpoint__keep_last": 10}


def cut_off_after(step: int, attempt: int) -> Callable[[Coordinator, dict[str, Any]], None]:
    """Nobody hears the ranks any more once the checkpoint of a step is committed."""

    def on_message(coordinator: Coordinator, envelope: dict[str, Any]) -> None:
        run_dir = coordinator._run_dir
        if (run_dir.checkpoint(step, attempt) / MANIFEST).exists():
            raise ConnectionError("cut off by the test")

    return on_message


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, starter: str) -> Made:
    base = tmp_path_factory.mktemp("damaged")
    undisturbed = run_group(tiny_config(base, **CHANGES, run__name="undisturbed"), starter)
    assert undisturbed.outcome == "completed"
    config = tiny_config(base, **CHANGES, run__name="t")
    prepared = RunInputs.from_dict(run_task(starter, "prepare", {"config": config.model_dump(mode="json")}))
    group = run_group(config, starter, on_message=cut_off_after(NEWEST, 1))
    assert [m.step for m in committed(LocalStore(group.run_dir.path))] == [PREVIOUS, NEWEST]
    return Made(base, config, prepared, group.run_dir, undisturbed)


@pytest.fixture
def run(made: Made, tmp_path: Path) -> Damaged:
    return made.copy(tmp_path)


def manifest_name(step: int, attempt: int = 1) -> str:
    return f"checkpoints/step-{step:08d}-a{attempt:04d}/{MANIFEST}"


# Found, passed over, said ---------------------------------------------------


def test_an_undamaged_run_goes_on_after_its_newest_checkpoint(run: Damaged, caplog: pytest.LogCaptureFixture) -> None:
    assert run.open().start_checkpoint == manifest_name(NEWEST)
    assert run.events == []
    assert not caplog.records


def assert_passed_over(run: Damaged, caplog: pytest.LogCaptureFixture, name: str) -> None:
    """The previous checkpoint is used; ledger and log name the file, once each; nothing else is touched."""
    before = run.contents()
    caplog.set_level(logging.WARNING)
    spec = run.open()
    assert spec.start_checkpoint == manifest_name(PREVIOUS)
    (attempt,) = [a for a in read_attempts(LocalStore(run.dir.path)) if a.number == 2]
    assert (attempt.start_step, attempt.start_attempt) == (PREVIOUS, 1)
    (event,) = run.events
    path = f"checkpoints/step-{NEWEST:08d}-a0001/{name}"
    assert path in event["error"]
    # A manifest that cannot be read does not tell its step; its path does.
    assert event["step"] in ((None, NEWEST) if name == MANIFEST else (NEWEST,))
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert path in record.getMessage()
    after = run.contents()
    assert after.pop("attempts/0002.json")
    assert after == before


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_the_previous_checkpoint_is_used_and_the_damage_is_said(
    name: str, damage: str, run: Damaged, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGES[damage](run.file(NEWEST, name))
    assert_passed_over(run, caplog, name)


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param(r'\n "step": (4)', id="step"),  # it does not fit the folder any more
        pytest.param(r'\n "attempt": (1)', id="attempt"),
        pytest.param(r'"forma(t)_version"', id="a key"),
        pytest.param(r'"format_version": (1)', id="format_version"),
        pytest.param(r'\n "optimizer_step": (4)', id="optimizer_step"),
        pytest.param(r'"position": \d*(\d)\b', id="cursor.position"),
        pytest.param(r'"epoch": (\d)', id="cursor.epoch"),
        pytest.param(r'\n "world_size": (\d)', id="world_size"),
        pytest.param(r'\n "zero_stage": (\d)', id="zero_stage"),
        pytest.param(r'"seed": (\d)', id="fingerprint.seed"),
        pytest.param(r'"global_batch_size": (\d)', id="fingerprint.global_batch_size"),
        pytest.param(r'"params": \[\s*\{\s*"name": "(\w)', id="a parameter's name"),
        pytest.param(r'"shape": \[\s*\d*(\d)', id="a parameter's shape"),
        pytest.param(r'\n "run_id": "(t)"', id="run_id"),
        pytest.param(r'"num_bytes": (\d)', id="a file's size"),
        pytest.param(r'"xxh3": "[a-z]*(\d)', id="a file's hash"),
        pytest.param(r'\n "xxh3": "[a-z]*(\d)', id="its own hash"),
    ],
)
def test_a_manifest_that_still_parses_is_found_too(
    pattern: str, run: Damaged, caplog: pytest.LogCaptureFixture
) -> None:
    flip_digit(run.file(NEWEST, MANIFEST), pattern)
    assert_passed_over(run, caplog, MANIFEST)


def test_a_flipped_bit_in_a_manifest_is_found_or_changes_nothing(made: Made) -> None:
    whole = (made.dir.checkpoint(NEWEST, 1) / MANIFEST).read_bytes()
    wanted = Manifest.decode(whole)
    unseen = 0
    for position in range(0, len(whole), 11):
        data = bytearray(whole)
        data[position] ^= 1 << position % 8
        try:
            found = Manifest.decode(bytes(data))
        except CheckpointError:
            continue
        assert found == wanted, f"byte {position} of the manifest"
        unseen += 1
    assert unseen < len(whole) / 11 / 50, "rare: a 17th digit of a number, an E for an e"


def test_the_folder_gone_entirely_leaves_the_previous_checkpoint(run: Damaged) -> None:
    # What retention, or a user, deleted as a whole is no damage.
    shutil.rmtree(run.dir.checkpoint(NEWEST, 1))
    assert run.open().start_checkpoint == manifest_name(PREVIOUS)


def test_a_slice_that_is_a_link_is_damage(run: Damaged, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = run.file(NEWEST, SLICES[1])
    elsewhere = path.rename(tmp_path / "elsewhere")
    path.symlink_to(elsewhere)
    assert run.open().start_checkpoint == manifest_name(PREVIOUS)
    (event,) = run.events
    assert SLICES[1] in event["error"]


# Nothing whole, nothing committed -------------------------------------------


@pytest.mark.parametrize(
    "damages",
    [
        pytest.param([(SLICES[0], flip_payload), (SLICES[1], Path.unlink)], id="slices"),
        pytest.param([(MANIFEST, empty), (MANIFEST, flip_first)], id="manifests"),
        pytest.param([(MANIFEST, empty), (SLICES[0], cut_one_byte)], id="a manifest and a slice"),
        pytest.param([(MANIFEST, Path.unlink), (MANIFEST, Path.unlink)], id="no manifest left"),
    ],
)
def test_with_every_checkpoint_damaged_nothing_starts_and_nothing_is_deleted(
    damages: list[tuple[str, Callable[[Path], None]]], run: Damaged, caplog: pytest.LogCaptureFixture
) -> None:
    for step, (name, damage) in zip((PREVIOUS, NEWEST), damages, strict=True):
        damage(run.file(step, name))
    before = run.contents()
    with pytest.raises(CheckpointError, match="no checkpoint of this run is whole") as caught:
        run.open()
    for step, (name, _) in zip((PREVIOUS, NEWEST), damages, strict=True):
        assert f"step-{step:08d}-a0001/{name}" in str(caught.value)
    assert "run.name" in str(caught.value), "it must say what to do"
    assert len(run.events) == 2
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2
    assert run.contents() == before


def test_a_folder_without_a_manifest_is_ignored(run: Damaged, caplog: pytest.LogCaptureFixture) -> None:
    # Both ranks had staged step 6, and the coordinator died before the commit.
    whole = run.dir.checkpoint(NEWEST, 1)
    shutil.rmtree(run.dir.checkpoint(6, 1), ignore_errors=True)  # begun or not before the run was cut off
    shutil.copytree(whole, run.dir.checkpoint(6, 1), ignore=shutil.ignore_patterns(MANIFEST))
    (run.dir.checkpoint(8, 1)).mkdir()
    (run.dir.checkpoint(8, 1) / f".{SLICES[0]}.0a1b2c3d").write_bytes(bytes(100))
    (run.dir.checkpoint(8, 1) / f".{MANIFEST}.0a1b2c3d").write_bytes((whole / MANIFEST).read_bytes())
    assert run.open().start_checkpoint == manifest_name(NEWEST)
    assert run.events == []
    assert not caplog.records


# Resumed to the end ---------------------------------------------------------


def assert_ends_as_undisturbed(made: Made, run_dir: Run, first_replayed: int) -> None:
    """Losses, digests, weights and optimizer state are bitwise those of the run that nothing happened to."""
    rows = last_rows(run_dir.metrics)
    assert {step: row["loss"] for step, row in rows.items()} == made.undisturbed.losses
    assert {step: row["digest"] for step, row in rows.items()} == made.undisturbed.digests
    newest = max(row["attempt"] for row in rows.values())
    assert [step for step, row in sorted(rows.items()) if row["attempt"] == newest] == list(range(first_replayed, 7))
    weights, states = [], []
    for path in (made.undisturbed.run_dir.path, run_dir.path):
        manifest = committed(LocalStore(path))[-1]
        assert manifest.step == 6
        states.append([file.xxh3 for file in manifest.files])
        (file,) = consolidate(LocalStore(path), manifest, path / "weights", stem="model", dtype="float32")
        weights.append(file.read_bytes())
    assert states[0] == states[1]
    assert weights[0] == weights[1]


def test_the_resumed_run_ends_bitwise_as_the_undisturbed_one(made: Made, run: Damaged, starter: str) -> None:
    # With a damaged manifest here, with damaged slices in the two tests below.
    DAMAGES["empty"](run.file(NEWEST, MANIFEST))
    group = run_group(run.config, starter)
    assert group.outcome == "completed"
    assert len(run.events) == 1
    assert_ends_as_undisturbed(made, run.dir, first_replayed=PREVIOUS + 1)


def test_damaged_twice_the_run_goes_back_over_two_attempts(made: Made, run: Damaged, starter: str) -> None:
    # Attempt 2 forks off at step 2 and commits a step 4 of its own, which is damaged too: the damaged step 4 of
    # attempt 1 must not come back, and step 2 is still there.
    DAMAGES["removed"](run.file(NEWEST, SLICES[0]))
    run_group(run.config, starter, on_message=cut_off_after(NEWEST, 2))
    assert (run.dir.checkpoint(NEWEST, 2) / MANIFEST).exists()
    DAMAGES["cut by one byte"](run.file(NEWEST, SLICES[0], attempt=2))
    group = run_group(run.config, starter)
    assert group.outcome == "completed"
    starts = [(a.start_step, a.start_attempt) for a in read_attempts(LocalStore(run.dir.path))]
    assert starts == [(0, 0), (PREVIOUS, 1), (PREVIOUS, 1)]
    assert [event["step"] for event in run.events] == [NEWEST] * 2
    for attempt, event in enumerate(run.events, start=1):
        assert f"step-{NEWEST:08d}-a{attempt:04d}/{SLICES[0]}" in event["error"]
    assert_ends_as_undisturbed(made, run.dir, first_replayed=PREVIOUS + 1)


@pytest.mark.parametrize(
    "is_all",
    [pytest.param(False, id="the newest damaged"), pytest.param(True, marks=pytest.mark.faults, id="all damaged")],
)
def test_the_command_says_it_on_standard_error(
    is_all: bool, made: Made, run: Damaged, cli: str, ray_address: str, tmp_path: Path
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(dump_yaml(run.config))
    steps = (PREVIOUS, NEWEST) if is_all else (NEWEST,)
    for step in steps:
        flip_payload(run.file(step, SLICES[0]))
    command = [cli, "train", str(config), f"cluster.address={ray_address}", "--resume"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    said = [line for line in done.stderr.splitlines() if "damaged and passed over" in line]
    assert len(said) == len(steps), done.stderr
    for step, line in zip(reversed(steps), said, strict=True):
        assert f"checkpoints/step-{step:08d}-a0001/{SLICES[0]} is damaged" in line
    if is_all:
        assert done.returncode == 1
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert "no checkpoint of this run is whole" in errors[0]
        assert read_json(run.dir.run_json)["state"] == "failed"
        assert len(read_attempts(LocalStore(run.dir.path))) == 1
    else:
        assert done.returncode == 0, done.stderr
        assert "completed after 6 steps" in done.stdout
        assert f"attempt 2 on 2 workers, going on after step {PREVIOUS}" in done.stderr
        assert_ends_as_undisturbed(made, run.dir, first_replayed=PREVIOUS + 1)
