"""`dist-ft logs` of a run: which files, and the same text of many ranks once."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from dist_ft import cli
from dist_ft.layout import RunDir, rank_log_name
from dist_ft.run.state import RunRecord
from dist_ft.storage.publish import write_json

ERROR = 'Traceback (most recent call last):\n  File "x.py", line 1\nRuntimeError: rank {rank} has no peer\n'


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "demo")
    write_json(made.run_json, asdict(RunRecord("demo", "running", attempt=2)))
    for attempt, num_ranks in ((1, 2), (2, 3)):
        made.logs(attempt).mkdir(parents=True)
        for rank in range(num_ranks):
            text = f"2026-11-27 11:59:10,{rank:03d} dist_ft: rank {rank} of {num_ranks} joined\nown {rank}\n"
            (made.logs(attempt) / rank_log_name(rank)).write_text(text + ERROR.format(rank=rank))
    made.story.write_text("what happened\n")
    return made


def call(monkeypatch: pytest.MonkeyPatch, run: RunDir, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["dist-ft", "logs", str(run.path), *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


Capture = pytest.CaptureFixture[str]


def test_the_same_error_is_shown_once(run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert call(monkeypatch, run) == 0
    out = capsys.readouterr().out
    assert out.count("==> attempt-0002/rank-") == 3
    assert out.count("Traceback") == 1
    assert out.count("[ends with the same error as rank 0]") == 2
    assert [f"own {rank}" in out for rank in range(3)] == [True] * 3


@pytest.mark.parametrize(
    ("arguments", "files"),
    [
        ((), ["0002/rank-00000", "0002/rank-00001", "0002/rank-00002"]),
        (("--attempt", "1"), ["0001/rank-00000", "0001/rank-00001"]),
        (("--rank", "2"), ["0002/rank-00002"]),
        (("--attempt", "1", "--rank", "1"), ["0001/rank-00001"]),
    ],
)
def test_attempt_and_rank_choose_the_files(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: Capture, arguments: tuple[str, ...], files: list[str]
) -> None:
    assert call(monkeypatch, run, *arguments) == 0
    heads = [
        line[len("==> attempt-") : -len(".log <==")] for line in capsys.readouterr().out.splitlines() if "==>" in line
    ]
    assert heads == files


def test_lines_that_are_looked_for_are_shown_once_with_their_ranks(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert call(monkeypatch, run, "--grep", "joined|Error|own 1") == 0
    assert capsys.readouterr().out.splitlines() == [
        "ranks 0-2: 2026-11-27 11:59:10,000 dist_ft: rank 0 of 3 joined",
        "ranks 0-2: RuntimeError: rank 0 has no peer",
        "rank 1: own 1",
    ]


def test_the_story_is_printed(run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert call(monkeypatch, run, "--story") == 0
    assert capsys.readouterr().out == "what happened\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--attempt", "7"), "no logs of attempt 7; there are: 1-2"),
        (("--rank", "3"), "attempt 2 of run"),
        (("--grep", "("), "is not a regular expression"),
        (("--story", "--rank", "1"), "--story is the whole run"),
    ],
)
def test_what_is_not_there_ends_with_2(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: Capture, arguments: tuple[str, ...], said: str
) -> None:
    assert call(monkeypatch, run, *arguments) == 2
    assert said in capsys.readouterr().err
