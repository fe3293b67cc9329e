"""Data prepared by the cluster: all of it ahead, or while training goes on; the samples are the same."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.helpers.runs import Run

STEPS = 12
SETTINGS = [
    f"train.max_steps={STEPS}", "data.part_mib=0.006", "data.packing=true", "data.seq_len=128",
    "checkpoint.every_steps=3", "cluster.num_workers=2",
]  # fmt: skip


def write_rows(path: Path, count: int, bad: int | None = None) -> Path:
    with path.open("w") as file:
        for n in range(count):
            messages = [
                {"role": "user", "content": f"Say number {n}" + "!" * (n % 11)},
                {"role": "assistant", "content": f"The number is {n}" + "." * (n % 7)},
            ]
            file.write("broken\n" if n == bad else json.dumps({"messages": messages}) + "\n")
    return path


def sources(*paths: Path) -> str:
    weighted = ", ".join(f"{{source: {path}, weight: {1 + place}}}" for place, path in enumerate(paths))
    return f"data.train=[{weighted}]"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    return sources(write_rows(folder / "a.jsonl", 150), write_rows(folder / "b.jsonl", 400))


@pytest.fixture(scope="module")
def ahead(cli: str, ray_address: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(cli, tmp_path_factory.mktemp("ahead"), ray_address, "ahead", *SETTINGS, data)
    code, result, err = run.finish()
    assert (code, result["state"]) == (0, "completed"), err
    assert "preparing data: " in err
    return run


def digests(run: Run) -> list[str]:
    rows = run.rows()
    return [rows[step]["digest"] for step in sorted(rows)]


def test_a_streamed_run_uses_the_same_samples_and_comes_to_the_same_weights(
    cli: str, ray_address: str, data: str, ahead: Run, tmp_path: Path
) -> None:
    run = Run(cli, tmp_path, ray_address, "stream", *SETTINGS, data, "data.preparation=stream")
    code, result, err = run.finish()
    assert (code, result["state"]) == (0, "completed"), err
    assert "prepared while training goes on" in err
    assert digests(run) == digests(ahead)
    assert len(digests(run)) == STEPS
    assert run.state() == ahead.state()


def test_a_streamed_run_that_is_killed_goes_on_where_it_was(
    cli: str, ray_address: str, data: str, ahead: Run, tmp_path: Path
) -> None:
    settings = [*SETTINGS, data, "data.preparation=stream"]
    run = Run(cli, tmp_path, ray_address, "killed", *settings)
    run.wait_for(lambda record: record["step"] >= 4)
    run.process.kill()
    run.process.communicate()
    again = Run(cli, tmp_path, ray_address, "killed", *settings, "--resume")
    code, result, err = again.finish()
    assert (code, result["state"]) == (0, "completed"), err
    assert digests(again) == digests(ahead)
    assert again.state() == ahead.state()


@pytest.mark.faults
def test_a_bad_row_met_while_training_stops_with_a_checkpoint_and_may_be_left_out(
    cli: str, ray_address: str, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "a.jsonl", 400, bad=300)
    settings = [*SETTINGS, sources(path), "data.preparation=stream"]
    run = Run(cli, tmp_path, ray_address, "bad", *settings)
    code, result, err = run.finish()
    assert code == 2, err
    assert f"{path}:301: not valid JSON" in result["error"]["message"]
    again = Run(cli, tmp_path, ray_address, "bad", *settings, "data.bad_rows=skip", "--resume")
    code, result, err = again.finish()
    assert (code, result["state"], result["steps"]) == (0, "completed", STEPS), err
    assert sorted(again.rows()) == list(range(1, STEPS + 1))


@pytest.mark.faults
def test_a_bad_row_met_before_there_are_workers_is_an_error_too(cli: str, ray_address: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", 400, bad=0)
    run = Run(cli, tmp_path, ray_address, "early", *SETTINGS, sources(path), "data.preparation=stream")
    code, result, err = run.finish()
    assert (code, result["state"], result["steps"]) == (2, "failed", 0), err
    assert f"{path}:1: not valid JSON" in result["error"]["message"]


@pytest.mark.faults
def test_a_source_that_changes_under_a_run_is_named(cli: str, ray_address: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", 200)
    settings = [*SETTINGS, sources(path), "train.max_steps=300"]
    run = Run(cli, tmp_path, ray_address, "changed", *settings)
    run.wait_for(lambda record: record["step"] >= 3)
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.finish()[0] == 3
    write_rows(path, 201)
    again = Run(cli, tmp_path, ray_address, "changed", *settings, "--resume")
    _, err = again.process.communicate(timeout=120)
    assert again.process.returncode == 2, err
    assert f"{path} has changed" in err
