"""The layout of a run directory, atomic JSON files and rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_ft.layout import FORMAT_VERSION, RunDir, checkpoint_name, slices_name
from dist_ft.storage.publish import read_json, write_json


def test_the_layout_is_that_of_the_design() -> None:
    run = RunDir(Path("/runs/r"))
    paths = [
        run.config, run.run_json, run.ledger, run.metrics, run.evals, run.attempts, run.checkpoint(40, 3),
        run.export(40), run.logs(1), run.stop_request,
    ]  # fmt: skip
    assert [str(path.relative_to(run.path)) for path in paths] == [
        "config.yaml", "run.json", "ledger.jsonl", "metrics.jsonl", "eval.jsonl", "attempts",
        "checkpoints/step-00000040-a0003", "exports/step-00000040", "logs/attempt-0001", "stop-request.json",
    ]  # fmt: skip
    assert slices_name(0, 2) == "slices-00000-of-00002.safetensors"


def test_names_sort_like_steps_and_attempts() -> None:
    places = [(step, attempt) for step in (0, 9, 10, 99_999_999) for attempt in (1, 9, 10, 9999)]
    assert sorted(places) == [p for _, p in sorted((checkpoint_name(*p), p) for p in places)]


def test_json_comes_back_with_its_format(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.json"
    write_json(path, {"state": "running", "name": "größe", "nothing": None})
    assert read_json(path) == {
        "format_version": FORMAT_VERSION,
        "state": "running",
        "name": "größe",
        "nothing": None,
    }


def test_rewriting_leaves_one_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    for step in range(3):
        write_json(path, {"step": step})
    assert read_json(path)["step"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_who_reads_while_it_is_rewritten_sees_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"step": 1})
    with path.open() as reader:
        write_json(path, {"step": 2})
        assert json.load(reader)["step"] == 1
    assert read_json(path)["step"] == 2


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"step": 1})
    with pytest.raises(TypeError):
        write_json(path, {"step": object()})
    assert read_json(path)["step"] == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "5",
        "null",
        "{}",
        '{"format_version": null}',
        '{"format_version": 2}',
        '{"format_version": "1"}',
        "\udcff",
    ],
)
def test_what_was_not_written_by_this_release_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError):
        read_json(path)


def test_another_format_is_named_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match=r"run\.json.*format_version 1"):
        read_json(path)


def test_a_missing_json_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "run.json")
