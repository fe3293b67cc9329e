"""The check of a device: choosing sections, judging what they leave, reporting; two sections for real."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.gpu.check import LIMITS, SKIPPED_STATUS, Verdict, answer, choose, in_process, judge, main, run_sections
from tests.gpu.sections import SECTIONS
from tests.gpu.wheels import CARRIED, choose_wheels, pinned
from tests.helpers.paths import ROOT


def test_every_section_has_a_limit_and_a_line_in_the_docs() -> None:
    assert list(SECTIONS) == list(LIMITS)
    rows = re.findall(r"^\| `([\w-]+)`", (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == list(LIMITS)


def test_sections_run_in_the_order_of_the_table() -> None:
    assert choose("ray, preflight") == ["preflight", "ray"]
    assert choose(None) == list(LIMITS)


def test_an_unknown_section_is_named_with_the_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--sections", "preflight,nccl", "--out", str(tmp_path)]) == 2
    assert "no section nccl; choose of preflight, numerics" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "output", "verdict", "reason"),
    [
        (0, f"noise\n{answer(figures={'GiB': 3})}\n", Verdict.PASSED, ""),
        (SKIPPED_STATUS, answer("there is no CUDA device"), Verdict.SKIPPED, "there is no CUDA device"),
        (1, "Traceback\nAssertionError: no bfloat16\n", Verdict.FAILED, "ended with 1: AssertionError: no bfloat16"),
        (0, "", Verdict.FAILED, "ended with 0: it said nothing"),
        (-6, f"{answer()}\nCUDA error\n", Verdict.FAILED, "ended with -6: CUDA error"),
        (None, "began\n\n", Verdict.FAILED, "killed after 7 s; it said last: began"),
    ],
)
def test_the_verdict_comes_from_status_and_answer(status: int | None, output: str, verdict: str, reason: str) -> None:
    result = judge("memory", status, output, 7.0)
    assert (result.verdict, result.reason) == (verdict, reason)
    assert result.figures == ({"GiB": 3} if verdict == Verdict.PASSED else {})


def test_one_failure_ends_no_other_section_and_late_ones_are_skipped_by_name() -> None:
    now = [0.0]
    limits = []

    def run(name: str, limit_s: float) -> tuple[int | None, str]:
        limits.append(limit_s)
        now[0] += 40
        return (1, "no") if name == "numerics" else (0, answer())

    results = run_sections(choose("preflight,numerics,resume-1,resume-2"), run, lambda: now[0], total_s=100)
    assert [result.verdict for result in results] == ["passed", "failed", "passed", "skipped"]
    assert results[-1].reason == "the 100 s for all sections are used up"
    assert limits == [60, 60, 20]


def test_results_are_written_as_json_and_as_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(name: str, limit_s: float) -> tuple[int | None, str]:
        return (0, answer(figures={"times": 2})) if name == "packed" else (SKIPPED_STATUS, answer("a | b"))

    assert main(["--sections", "packed,ray", "--out", str(tmp_path)], run) == 0
    written = json.loads((tmp_path / "results.json").read_text())
    assert [(row["section"], row["verdict"], row["figures"]) for row in written] == [
        ("packed", "passed", {"times": 2}),
        ("ray", "skipped", {}),
    ]
    table = (tmp_path / "table.md").read_text()
    assert "| packed | passed | 0 | times 2 |" in table and "| ray | skipped: a / b | 0 |  |" in table
    assert capsys.readouterr().out.endswith(table)


def test_a_failed_section_gives_exit_code_1(tmp_path: Path) -> None:
    assert main(["--sections", "packed", "--out", str(tmp_path)], lambda name, limit_s: (1, "no")) == 1


def test_a_section_that_does_not_end_is_killed_with_its_limit() -> None:
    assert in_process("preflight", 0.01)[0] is None


def test_sections_without_a_device_run_what_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    preflight = judge("preflight", *in_process("preflight", 300), seconds=0)
    assert preflight.verdict is Verdict.PASSED, preflight
    assert (preflight.figures["device"], preflight.figures["backend"]) == ("cpu", "gloo")
    offload = judge("offload-2", *in_process("offload-2", 300), seconds=0)
    assert (offload.verdict, offload.reason) == (Verdict.SKIPPED, "there is no CUDA device")


def test_wheels_of_pinned_versions_are_carried_as_far_as_they_fit() -> None:
    versions = pinned((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert all(name in versions for name in CARRIED if name != "trl")
    sizes = {"deepspeed": 20, "trl": 5, "ray": 40}
    assert choose_wheels(sizes, limit=70) == (["deepspeed", "trl", "ray"], [])
    assert choose_wheels(sizes, limit=60) == (["deepspeed", "trl"], ["ray"])
