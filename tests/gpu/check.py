"""Tries dist-ft on one device, section by section: `python -m tests.gpu.check` (make gpu-check; docs/gpu.md).

Needs Python, a torch and what the sections import; nothing is fetched. Each section runs in a process of its own with a
limit, so that a CUDA error, or a hang, ends that section alone. This module imports neither torch nor dist_ft.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOTAL_S = 540.0
"""What all sections may take together: nine minutes."""
_TAIL = 2000

Figures = dict[str, float | int | str]
Child = Callable[[str, float], tuple[int | None, str]]
"""Runs a section within seconds; returns its exit status, None for one that was killed, and all that it printed."""


class Verdict(StrEnum):
    """How a section ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Result:
    """A section's verdict.

    Attributes:
        section: Its name.
        verdict: How it ended.
        reason: Why it did not pass.
        seconds: How long it took.
        figures: What it measured.
    """

    section: str
    verdict: Verdict
    reason: str = ""
    seconds: float = 0.0
    figures: Figures = field(default_factory=dict)


# Section -> limit in seconds, in the order in which they run: what is cheap and tells most comes first.
LIMITS: dict[str, float] = {
    "preflight": 60,
    "numerics": 90,
    "resume-1": 90,
    "resume-2": 90,
    "resume-3": 90,
    "packed": 60,
    "memory": 60,
    "offload-2": 60,
    "offload-3": 60,
    "background": 60,
    "two-ranks": 60,
    "generation": 60,
    "lora-1b": 100,
    "full-1b": 100,
    "ray": 120,
}
_ANSWER = "GPU-CHECK "
SKIPPED_STATUS = 77


def choose(names: str | None) -> list[str]:
    """Returns the sections that were asked for, in the order of the table; all of them without `names`.

    Raises:
        ValueError: A name that the table does not have.
    """
    if names is None:
        return list(LIMITS)
    wanted = {name.strip() for name in names.split(",") if name.strip()}
    if unknown := sorted(wanted - set(LIMITS)):
        raise ValueError(f"--sections={names}: there is no section {', '.join(unknown)}; choose of {', '.join(LIMITS)}")
    return [name for name in LIMITS if name in wanted]


def judge(section: str, status: int | None, output: str, seconds: float) -> Result:
    """Returns the verdict on what a section's process left."""
    lines = output.splitlines()
    answers = [line for line in lines if line.startswith(_ANSWER)]
    if status is None:
        last = next((line for line in reversed(lines) if line.strip()), "nothing")
        return Result(section, Verdict.FAILED, f"killed after {seconds:.0f} s; it said last: {last}", seconds)
    if status in (0, SKIPPED_STATUS) and answers:
        answer = json.loads(answers[-1].removeprefix(_ANSWER))
        verdict = Verdict.PASSED if status == 0 else Verdict.SKIPPED
        return Result(section, verdict, answer["reason"], seconds, answer["figures"])
    last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
    return Result(section, Verdict.FAILED, f"ended with {status}: {last}", seconds)


def run_sections(
    names: Sequence[str], run: Child, clock: Callable[[], float], total_s: float, patience: float = 1.0
) -> list[Result]:
    """Runs sections one after the other; none starts when the time for all is used up.

    Args:
        names: The sections.
        run: Runs one.
        clock: Tells the time in seconds.
        total_s: What all may take together.
        patience: Multiplies each section's limit.
    """
    deadline = clock() + total_s
    results = []
    for name in names:
        began = clock()
        if began >= deadline:
            result = Result(name, Verdict.SKIPPED, f"the {total_s:.0f} s for all sections are used up")
        else:
            status, output = run(name, min(patience * LIMITS[name], deadline - began))
            result = judge(name, status, output, clock() - began)
            if result.verdict is Verdict.FAILED:
                print(output[-_TAIL:], file=sys.stderr)
        print(f"{result.section:12} {result.verdict:8} {result.seconds:6.1f} s  {result.reason}", flush=True)
        results.append(result)
    return results


def to_table(results: Sequence[Result]) -> str:
    """Returns the results as a table of docs/gpu.md."""
    rows = ["| section | verdict | seconds | figures |", "|---|---|---|---|"]
    for result in results:
        verdict = result.verdict + (f": {result.reason}" if result.reason else "")
        figures = ", ".join(f"{name} {value}" for name, value in result.figures.items())
        cells = [result.section, verdict, f"{result.seconds:.0f}", figures]
        rows.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def answer(reason: str = "", figures: Figures | None = None) -> str:
    """Returns the line with which a section ends."""
    return _ANSWER + json.dumps({"reason": reason, "figures": figures or {}})


def in_process(name: str, limit_s: float) -> tuple[int | None, str]:
    """Runs a section in a process group of its own, which is killed as a whole."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as directory:
        log = Path(directory) / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.gpu.sections", name, directory],
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,
            )
            try:
                status: int | None = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                status = None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what a section left behind
            process.wait()
        return status, log.read_text(errors="replace")


def main(arguments: Sequence[str] | None = None, run: Child = in_process) -> int:
    """Runs the sections and writes the results; 1 if one failed, 2 for a wrong name."""
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__)
    parser.add_argument("--sections", help=f"some of {','.join(LIMITS)}; all of them without")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check", help="folder of the results")
    parser.add_argument("--total-s", type=float, default=TOTAL_S, help="seconds for all sections")
    parser.add_argument("--patience", type=float, default=1.0, help="multiplies the sections' limits; for slow CPUs")
    options = parser.parse_args(arguments)
    try:
        names = choose(options.sections)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    results = run_sections(names, run, time.monotonic, options.total_s, options.patience)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    (options.out / "table.md").write_text(to_table(results))
    print(to_table(results), end="")
    return 1 if any(result.verdict is Verdict.FAILED for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
