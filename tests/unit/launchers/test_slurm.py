"""From config and template to a batch script, and from what Slurm prints to what is said of a job."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_ft.config import Config, load_config
from dist_ft.errors import ConfigError, DistFtError, UsageError
from dist_ft.launchers import slurm
from dist_ft.launchers.launcher import SubmitRequest
from dist_ft.launchers.slurm import SlurmLauncher, check_room, render, room
from tests.helpers.paths import ROOT

TEMPLATE = ROOT / "cluster" / "slurm" / "job.sbatch"
BIN = Path("/opt/it's here/bin")
LAUNCHER = SlurmLauncher(poll_s=0)
SHOWN = """\
JobId=17 JobName=mine
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   JobState={state} Reason=None Dependency=(null)
   Requeue=1 Restarts=1 BatchFlag=2 Reboot=0 ExitCode={code}
   StdOut={log}
   Comment=/shared/my runs/mine
"""


def config(directory: Path, *overrides: str) -> Config:
    path = directory / "mine.yaml"
    path.write_text("model: {name: tiny-random}\ndata: {train: [{source: /d/a.jsonl}]}\n")
    return load_config(path, overrides)


def script(directory: Path, *overrides: str, options: tuple[str, ...] = ("--json", "--resume")) -> str:
    return render(TEMPLATE.read_text(), config(directory, *overrides), options, BIN)


def test_the_script_is_one_that_bash_takes(tmp_path: Path) -> None:
    text = script(tmp_path)
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert not [place for place in ("@BIN@", "@CONFIG@", "@OPTIONS@") if place in text]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck (Debian: apt-get install shellcheck)")
@pytest.mark.parametrize("path", ["cluster/slurm/job.sbatch", "launch/slurm.sh"])
def test_shellcheck_finds_nothing(path: str) -> None:
    done = subprocess.run(
        ["shellcheck", "--severity=warning", str(TEMPLATE.parents[2] / path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(source=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1))
def test_whatever_the_config_holds_reaches_the_driver_unchanged(tmp_path: Path, source: str) -> None:
    """The part that writes the config is run by bash, in a directory where nothing else is to appear."""
    made = config(tmp_path).model_copy(update={"data": config(tmp_path).data.model_copy(
        update={"train": [config(tmp_path).data.train[0].model_copy(update={"source": source})]})})  # fmt: skip
    text = render(TEMPLATE.read_text(), made, (), BIN)
    here_document = text[text.index("cat >") : text.index("\n@END@\n") + len("\n@END@\n")]
    done = subprocess.run(
        ["bash", "-eu"], input=here_document, text=True, env={"config_dir": str(tmp_path), **os.environ}
    )
    assert done.returncode == 0
    assert load_config(tmp_path / "config.yaml").data.train[0].source == source


def test_a_config_that_would_end_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="@END@"):
        script(tmp_path, "data.train=[{source: '@END@'}]")


def test_a_template_with_a_typo_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has 0 @CONFIG@"):
        render(TEMPLATE.read_text().replace("@CONFIG@", "@CONFG@"), config(tmp_path), (), BIN)


def test_directives_are_all_before_the_first_command(tmp_path: Path) -> None:
    head, _, rest = script(tmp_path).partition("set -euo pipefail")
    assert {"--requeue", "--signal=B:USR1@300", "--no-kill"} <= set(head.split())
    assert "#SBATCH" not in rest


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], ("2", {"CPU": 8.0, "GPU": 0.0})),
        (["--nodes=4-8", "--gpus-per-node=h100:8"], ("4-8", {"CPU": 8.0, "GPU": 8.0})),
        (["--gres=gpu:2", "--cpus-per-task=4"], ("2", {"CPU": 4.0, "GPU": 2.0})),
    ],
)
def test_room_of_a_job(more: list[str], expected: tuple[str, dict[str, float]]) -> None:
    assert room(TEMPLATE.read_text(), more) == expected


def test_a_job_too_small_for_the_run_is_refused(tmp_path: Path) -> None:
    check_room(config(tmp_path, "cluster.num_workers=16"), "2", {"CPU": 8.0, "GPU": 0.0})
    check_room(config(tmp_path, "cluster.num_workers=[8, 99]"), "1-2", {"CPU": 0.0, "GPU": 4.0})
    check_room(config(tmp_path, "cluster.num_workers=99"), "2", {"CPU": 0.0, "GPU": 0.0})  # nothing is known
    with pytest.raises(ConfigError, match="2 nodes of 8 workers"):
        check_room(config(tmp_path, "cluster.num_workers=17"), "2", {"CPU": 32.0, "GPU": 8.0})


class Fake:
    """Slurm's commands, from a table of what they print."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **answers: list[str]) -> None:
        self.asked: list[tuple[tuple[str, ...], str | None]] = []
        self._answers = {"squeue": [""], "scancel": [""], **answers}
        monkeypatch.setattr(slurm, "_slurm", self)

    def __call__(self, *command: str, stdin: str | None = None) -> str:
        self.asked.append((command, stdin))
        answers = self._answers[command[0]]
        return answers.pop(0) if len(answers) > 1 else answers[0]


def job(state: str, code: str = "0:0", log: str = "/nowhere") -> str:
    return SHOWN.format(state=state, code=code, log=log)


def request(tmp_path: Path, **more: bool) -> SubmitRequest:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    path = tmp_path / "mine.yaml"
    path.write_text(f"model: {{name: tiny-random}}\ndata: {{train: [{{source: {tmp_path}/a.jsonl}}]}}\n")
    return SubmitRequest(path, (f"run.output_dir={tmp_path}/runs",), **more)


def test_a_submission_names_run_and_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(monkeypatch, sbatch=["17;cluster\n"])
    submitted = SlurmLauncher(TEMPLATE, ["--nodes=3"]).submit(request(tmp_path))
    command, text = fake.asked[-1]
    assert command == ("sbatch", "--parsable", "--job-name=mine", f"--comment={tmp_path}/runs/mine", "--nodes=3")
    assert text is not None and "options=(--json --preflight)" in text
    assert (submitted.job, submitted.run_dir) == ("slurm:17", f"{tmp_path}/runs/mine")


def test_a_run_that_is_queued_is_not_submitted_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(monkeypatch, squeue=[f"16 other\n17 {tmp_path}/runs/mine\n"])
    with pytest.raises(UsageError, match="slurm:17"):
        SlurmLauncher(TEMPLATE).submit(request(tmp_path, resume=True))
    assert [command[0] for command, _ in fake.asked] == ["squeue"]


def test_a_bad_config_or_template_reaches_no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(monkeypatch)
    for bad, template in (("data.train=[{source: /none.jsonl}]", TEMPLATE), ("optimizer.lr=1e-3", tmp_path / "none")):
        asked = request(tmp_path)
        with pytest.raises(DistFtError, match="none"):
            SlurmLauncher(template).submit(SubmitRequest(asked.config_path, (*asked.overrides, bad)))
    assert fake.asked == []


@pytest.mark.parametrize(
    ("state", "code", "expected"),
    [("COMPLETED", "0:0", 0), ("FAILED", "3:0", 3), ("TIMEOUT", "0:15", 143), ("NODE_FAIL", "0:0", 0)],
)
def test_what_is_said_of_a_job(monkeypatch: pytest.MonkeyPatch, state: str, code: str, expected: int) -> None:
    Fake(monkeypatch, scontrol=[job(state, code)])
    found = LAUNCHER.status("slurm:17")
    assert (found.job_state, found.is_over, found.exit_code, found.restarts) == (state, True, expected, 1)
    assert (found.run_dir, found.log) == ("/shared/my runs/mine", "/nowhere")
    assert state in found.describe()


def test_following_shows_the_output_over_all_tries_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    log.write_text("one\ntwo\n")
    states = [job(state, log=str(log)) for state in ("PENDING", "RUNNING", "PENDING", "RUNNING")]
    Fake(monkeypatch, scontrol=[*states, job("FAILED", "1:0", str(log))])
    assert LAUNCHER.follow("slurm:17").exit_code == 1
    assert capsys.readouterr().out.count("two") == 1
    assert LAUNCHER.logs("slurm:17") == "one\ntwo\n"


def test_the_result_of_a_try_that_was_requeued_is_not_that_of_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    log.write_text('{"run_dir": "/runs/a", "state": "stopped", "steps": 4}\n')
    first, last = job("RUNNING", log=str(log)), job("FAILED", "1:0", str(log))
    Fake(monkeypatch, scontrol=[first, last.replace("Restarts=1", "Restarts=2")])
    ended = LAUNCHER.follow("slurm:17")
    assert (ended.exit_code, ended.result) == (1, None)


@pytest.mark.parametrize(("state", "code"), [("COMPLETED", 0), ("NODE_FAIL", 1), ("CANCELLED", 1)])
def test_a_job_that_slurm_ended_is_a_failure_though_its_exit_code_is_0(
    monkeypatch: pytest.MonkeyPatch, state: str, code: int
) -> None:
    Fake(monkeypatch, scontrol=[job(state)])
    ended = LAUNCHER.follow("slurm:17")
    assert (ended.exit_code, ended.reason is not None) == (code, code == 1)


def test_a_stop_is_a_signal_to_the_driver_alone_and_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(monkeypatch, scontrol=[job("RUNNING"), job("RUNNING"), job("FAILED", "3:0")])
    assert "exit code 3" in LAUNCHER.stop("slurm:17", 10)
    assert ("scancel", "--batch", "--signal=INT", "17") in [command for command, _ in fake.asked]


def test_stops_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    Fake(monkeypatch, scontrol=[job("RUNNING")])
    with pytest.raises(DistFtError, match="still RUNNING after 0 s"):
        LAUNCHER.stop("slurm:17", 0)
    Fake(monkeypatch, scontrol=[job("COMPLETED")])
    with pytest.raises(UsageError, match="nothing to stop"):
        LAUNCHER.stop("slurm:17", 0)
    with pytest.raises(UsageError, match="such as slurm:17"):
        LAUNCHER.stop("slurm:17;rm", 0)


def test_slurm_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match="scontrol is not on PATH"):
        LAUNCHER.status("slurm:17")
