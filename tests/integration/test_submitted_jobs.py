"""`dist-ft submit --to ray` against a real head with dashboard and token: to the end, stopped, resumed, refused."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_ft.checkpoint.lineage import committed
from dist_ft.layout import RunDir
from dist_ft.storage.publish import read_json
from dist_ft.storage.store import LocalStore
from tests.helpers.ray_head import RayHead
from tests.helpers.rows import last_rows
from tests.helpers.runs import CONFIG

# A learning rate that does not depend on max_steps: runs of several lengths go the same way.
SETTINGS = [
    "data.eval=null", "monitor.wandb=disabled", "checkpoint.every_steps=20",
    "schedule={kind: constant, warmup_ratio: 0}",
]  # fmt: skip


class Client:
    """The command, as somebody uses it who is no part of the cluster."""

    def __init__(self, cli: str, head: RayHead, output_dir: Path) -> None:
        self._cli = cli
        self.head = head
        self.output_dir = output_dir

    def start(self, verb: str, *arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self._cli, verb, *arguments, "--address", self.head.url], env={**self.head.env, **(env or {})},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, verb: str, *arguments: str, env: dict[str, str] | None = None) -> tuple[int, str, str]:
        process = self.start(verb, *arguments, env=env)
        out, err = process.communicate(timeout=240)
        return process.returncode, out, err

    def submission(self, name: str, *arguments: str) -> list[str]:
        run = [f"run.output_dir={self.output_dir}", f"run.name={name}"]
        return [str(CONFIG), "--to", "ray", *run, *SETTINGS, *arguments]


@pytest.fixture(scope="module")
def client(cli: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    head = RayHead()
    yield Client(cli, head, tmp_path_factory.mktemp("jobs"))
    head.close()


def wait_for_step(run_dir: RunDir, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not run_dir.run_json.exists() or read_json(run_dir.run_json)["step"] < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.05)


def state(run_dir: RunDir) -> list[str]:
    return [file.xxh3 for file in committed(LocalStore(run_dir.path))[-1].files]


def trajectory(run_dir: RunDir) -> list[tuple[Any, ...]]:
    return [(step, row["digest"], row["loss"]) for step, row in sorted(last_rows(run_dir.metrics).items())]


@pytest.mark.timeout(600)  # three runs one after the other
def test_a_job_that_is_stopped_and_resubmitted_ends_as_an_undisturbed_one(client: Client) -> None:
    parts, whole = RunDir(client.output_dir / "parts"), RunDir(client.output_dir / "whole")
    following = client.start("submit", *client.submission("parts", "train.max_steps=5000", "--follow"))
    assert following.stdout is not None
    job = following.stdout.readline().split()[1]
    wait_for_step(parts, 3, following)

    code, _, err = client.run("submit", *client.submission("parts", "--resume"))
    assert code == 2, err
    assert job in err, "a second driver of a run at work is refused, and its job is named"

    code, out, err = client.run("stop", job)
    assert code == 0, err
    num_steps = read_json(parts.run_json)["step"]
    assert f"stopped at step {num_steps}" in out
    assert [manifest.step for manifest in committed(LocalStore(parts.path))][-1] == num_steps
    out, err = following.communicate(timeout=60)
    assert following.returncode == 3, out + err

    _, out, _ = client.run("status", job, "--json")
    found = json.loads(out)
    assert (found["job_state"], found["run"]["state"], found["run_id"]) == ("STOPPED", "stopped", "parts")

    length = f"train.max_steps={num_steps + 3}"
    code, out, err = client.run("submit", *client.submission("parts", length, "--resume", "--follow"))
    assert code == 0, out + err
    assert read_json(parts.run_json)["attempt"] == 2

    code, out, err = client.run("submit", *client.submission("whole", length, "--follow"))
    assert code == 0, out + err
    assert f"completed after {num_steps + 3} steps" in out
    assert (whole.exports / "final" / "model.safetensors").exists()

    assert trajectory(parts) == trajectory(whole)
    assert state(parts) == state(whole)


def test_an_error_in_the_job_is_the_exit_code_and_the_output_of_who_follows(client: Client) -> None:
    taken = client.output_dir / "taken"
    taken.mkdir()
    code, out, _ = client.run("submit", *client.submission("taken", "--follow"))
    assert code == 2
    assert "exists; continue it with --resume" in out
    assert list(taken.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "env", "words"),
    [
        ([], {"RAY_AUTH_TOKEN": "0" * 64}, ["refuses this token", "RAY_AUTH_TOKEN"]),
        ([], {"RAY_AUTH_MODE": "disabled"}, ["asks for a token", "RAY_AUTH_MODE=token"]),
        (["optimizer.lrr=1"], {}, ["did you mean optimizer.lr?"]),
        (["run.output_dir=runs"], {}, ["run.output_dir=runs is a relative path"]),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_in_a_line_and_starts_no_job(
    client: Client, arguments: list[str], env: dict[str, str], words: list[str]
) -> None:
    before = client.head.jobs()
    code, _, err = client.run("submit", *client.submission("refused", *arguments), env=env)
    assert code == 2
    assert all(word in err for word in words), err
    assert len(err.splitlines()) == 1, err
    assert client.head.jobs() == before
