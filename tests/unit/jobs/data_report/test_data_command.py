"""`dist-ft data show|check|prepare` through the entry point: exit codes, JSON, what is left on disk."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from dist_ft import cli
from tests.helpers.configs import write_rows
from tests.helpers.pages import check_inert
from tests.helpers.paths import ROOT

CONFIG = ROOT / "configs" / "smoke" / "full.yaml"


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Call = Callable[..., Result]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Calls `dist-ft data VERB CONFIG ...` with 41 rows, 7 of other content held out."""
    train, held_out = write_rows(tmp_path / "train.jsonl", 41), write_rows(tmp_path / "eval.jsonl", 7, first=1000)
    fixed = [f"run.output_dir={tmp_path / 'runs'}", "data.seq_len=128", f"data.eval={held_out}"]

    def invoke(verb: str, *arguments: str, source: Path = train) -> Result:
        overrides = [*fixed, f"data.train=[{{source: {source}}}]"]
        monkeypatch.setattr("sys.argv", ["dist-ft", "data", verb, str(CONFIG), *overrides, *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return Result(int(caught.value.code or 0), out, err)

    return invoke


@pytest.fixture
def bad_source(tmp_path: Path) -> Path:
    path = write_rows(tmp_path / "bad.jsonl", 3)
    with path.open("ab") as file:
        file.write(b'{"\x1b[2J": 1}\n' + json.dumps({"\x1b[2J\u202e": 1}).encode() + b"\n\x00\n")
    return path


def test_a_check_without_an_error_ends_with_0_and_leaves_nothing(call: Call, tmp_path: Path) -> None:
    done = call("check")
    assert done.code == 0
    assert "nothing to complain of" in done.out
    assert not (tmp_path / "runs").exists()


def test_a_warning_is_no_error(call: Call, tmp_path: Path) -> None:
    done = call("check", f"data.eval={tmp_path / 'train.jsonl'}")
    assert done.code == 0
    assert "41 of 41 held-out rows" in done.out


def test_a_check_with_an_error_ends_with_1_and_shows_every_bad_row(call: Call, bad_source: Path) -> None:
    done = call("check", source=bad_source)
    assert done.code == 1
    assert [f"{bad_source}:{line}: " in done.out for line in (3, 4, 5, 6)] == [False, True, True, True]
    assert all(character.isprintable() or character == "\n" for character in done.out)


def test_a_check_as_json_is_one_object_with_the_same_exit_code(call: Call, bad_source: Path) -> None:
    done = call("check", "--json", source=bad_source)
    report = json.loads(done.out)
    assert done.code == 1
    assert report["findings"][0]["severity"] == "error"
    assert report["splits"][0]["unreadable_rows"] == 3
    assert done.out.strip().isprintable()


def test_a_check_writes_a_page_beside_what_it_prints(call: Call, bad_source: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = call("check", "--json", "--html", str(page), source=bad_source)
    assert done.code == 1
    assert json.loads(done.out)["findings"][0]["message"] in page.read_text(encoding="utf-8")
    check_inert(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("place", ["missing/report.html", "."])
def test_a_page_that_cannot_be_written_is_one_error(call: Call, tmp_path: Path, place: str) -> None:
    done = call("check", "--html", str(tmp_path / place))
    assert (done.code, done.out) == (2, "")
    assert str(tmp_path / place) in done.err


def test_an_exceeded_limit_ends_with_1_and_names_key_limit_and_value(call: Call, tmp_path: Path) -> None:
    leaky = f"data.eval={tmp_path / 'train.jsonl'}"
    assert call("check", leaky, "data.limits.leaked=1").code == 0
    done = call("check", leaky, "data.limits.leaked=0.05")
    assert done.code == 1
    assert "data.limits.leaked=0.05 is exceeded" in done.out
    assert "41 of 41 (100.00%)" in " ".join(done.out.split())


@pytest.mark.parametrize("verb", ["show", "check", "prepare"])
def test_a_bad_config_ends_with_2(call: Call, verb: str) -> None:
    done = call(verb, "data.seq_len=x")
    assert (done.code, done.out) == (2, "")
    assert "data.seq_len" in done.err


@pytest.mark.parametrize("verb", ["show", "prepare"])
def test_what_a_run_refuses_is_refused(call: Call, verb: str, bad_source: Path) -> None:
    done = call(verb, source=bad_source)
    assert (done.code, done.out) == (2, "")
    assert f"{bad_source}:4: " in done.err
    assert all(character.isprintable() or character == "\n" for character in done.err)


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ([], [1, 2, 3]),
        (["--rows", "2"], [1, 2]),
        (["--row", "5"], [5]),
        (["--row", "5", "--rows", "2"], [5, 6]),
        (["--source", "eval", "--row", "1"], [1]),
    ],
)
def test_sequences_are_chosen(call: Call, arguments: list[str], rows: list[int]) -> None:
    done = call("show", "--json", *arguments)
    assert (done.code, [sequence["row"] for sequence in json.loads(done.out)["sequences"]]) == (0, rows)
    assert json.loads(done.out)["split"] == ("eval" if "eval" in arguments else "train.0")


@pytest.mark.parametrize(
    ("is_terminal", "arguments", "variable", "is_colored"),
    [
        (True, [], "", True),
        (True, ["--no-color"], "", False),
        (True, [], "1", False),
        (False, [], "", False),
    ],
)
def test_colours_are_for_terminals(
    call: Call, monkeypatch: pytest.MonkeyPatch,
    is_terminal: bool, arguments: list[str], variable: str, is_colored: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    monkeypatch.setenv("NO_COLOR", variable)
    done = call("show", *arguments)
    assert ("\x1b[32m" in done.out, "⟦" in done.out) == (is_colored, not is_colored)


def test_preparing_twice_says_that_all_is_there(call: Call, tmp_path: Path) -> None:
    first, second = call("prepare"), call("prepare")
    assert (first.code, second.code) == (0, 0)
    assert str(tmp_path / "runs") in first.out
    assert first.out.startswith("2 shards made: ")
    assert second.out.startswith("all is there already: ")
    assert "41 rows" in first.out and "7 rows" in first.out


def test_only_what_is_missing_is_made(call: Call, bad_source: Path) -> None:
    call("prepare")
    other = write_rows(bad_source, 5)
    done = call("prepare", source=other)
    assert done.out.startswith("1 shard made: ")


def test_what_is_prepared_is_what_is_shown(call: Call) -> None:
    call("prepare")
    assert "all is there already" in call("prepare").out
    shown = json.loads(call("show", "--rows", "999", "--json").out)
    assert len(shown["sequences"]) == shown["num_sequences"]
    tokens = sum(len(sample["input_ids"]) for sequence in shown["sequences"] for sample in sequence["samples"])
    assert tokens == shown["num_tokens"]
