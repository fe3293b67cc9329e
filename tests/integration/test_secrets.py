"""Planted secrets: a real run as a Ray job with keys in its environment; nothing that it leaves or shows has one."""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import subprocess
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from dist_ft.layout import RunDir
from dist_ft.storage.publish import read_json
from tests.helpers.ray_head import RayHead
from tests.helpers.runs import CONFIG

pytestmark = pytest.mark.timeout(600)  # the first test waits for the run

NAMES = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_REDIS_PASSWORD")
RUN_SECRET = "the run secret"
GIVE_RUN_SECRET = """
import os, secrets
made = secrets.token_hex
def token_hex(nbytes=None):
    if nbytes != 32:
        return made(nbytes)
    open(os.environ["DIST_FT_TEST_SECRET_USED"], "a").close()
    return os.environ["DIST_FT_TEST_RUN_SECRET"]
secrets.token_hex = token_hex
"""
"""As sitecustomize of the driver: the secret that it makes for its run is one that the test knows."""
WHAT_A_RUN_WRITES = {
    "config.yaml", "run.json", "ledger.jsonl", "metrics.jsonl", "manifest.json", "adapter_model.safetensors",
    "rank-00000.log",
}  # fmt: skip


class Leftovers(NamedTuple):
    """What the run left and showed, and the secrets that were in its environment.

    Attributes:
        run_dir: Of the run.
        session: Ray's session directory, logs of the job among it.
        shown: Name → text: output of the command and answers of the job server.
        command_lines: Those of all processes, seen while it ran.
        carriers: Command lines of the processes that had a secret in their environment.
        planted: Variable → value, the run secret among them.
        was_secret_used: Whether the driver made its run secret of the planted one.
    """

    run_dir: Path
    session: Path
    shown: dict[str, bytes]
    command_lines: set[bytes]
    carriers: set[bytes]
    planted: dict[str, str]
    was_secret_used: bool


@pytest.fixture(scope="module")
def leftovers(cli: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Leftovers]:
    with pytest.MonkeyPatch.context() as patch:
        planted = {name: f"planted{secrets.token_hex(20)}" for name in NAMES}
        for name, value in planted.items():
            patch.setenv(name, value)
        planted[RUN_SECRET] = f"planted{secrets.token_hex(20)}"
        directory = tmp_path_factory.mktemp("run-secret")
        (directory / "sitecustomize.py").write_text(GIVE_RUN_SECRET)
        patch.setenv("PYTHONPATH", str(directory), prepend=os.pathsep)
        patch.setenv("DIST_FT_TEST_RUN_SECRET", planted[RUN_SECRET])
        patch.setenv("DIST_FT_TEST_SECRET_USED", str(directory / "used"))
        head = RayHead()
    planted["RAY_AUTH_TOKEN"] = head.env["RAY_AUTH_TOKEN"]
    output_dir = tmp_path_factory.mktemp("secrets")
    command = [
        cli, "submit", str(CONFIG), "--to", "ray", "--follow", "--address", head.url, f"run.output_dir={output_dir}",
        "run.name=r", "method={kind: lora, r: 4}", "monitor.wandb=offline", "eval.metrics=[exact_match]",
        "eval.max_rows=4", "eval.max_new_tokens=4", "train.max_steps=6", "checkpoint.every_steps=3",
    ]  # fmt: skip
    try:
        with Processes(planted["WANDB_API_KEY"]) as seen:
            done = subprocess.run(command, env=head.env, capture_output=True, timeout=240, check=False)
        assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
        job = done.stdout.split()[1].decode()
        shown = {"stdout": done.stdout, "stderr": done.stderr, "the server's jobs": head.ask("/api/jobs/")}
        for verb in ("status", "logs"):
            told = subprocess.run(
                [cli, verb, job, "--address", head.url], env=head.env, capture_output=True, check=True
            )
            shown[verb] = told.stdout + told.stderr
        yield Leftovers(
            output_dir / "r",
            head.directory,
            shown,
            seen.command_lines,
            seen.carriers,
            planted,
            (directory / "used").exists(),
        )
    finally:
        head.close()


def test_the_run_had_the_secrets_and_left_what_a_run_leaves(leftovers: Leftovers) -> None:
    """Else nothing found below would mean nothing."""
    assert read_json(RunDir(leftovers.run_dir).run_json)["state"] == "completed"
    assert leftovers.was_secret_used
    names = {path.name for path in leftovers.run_dir.rglob("*")}
    assert names >= WHAT_A_RUN_WRITES
    assert list(leftovers.run_dir.glob("wandb/offline-run-*/*.wandb"))
    assert list(leftovers.session.glob("session_2*/logs/job-driver-*.log"))
    for part in (b"raylet", b"ray::", b"dist-ft\0train", b"dist_ft.orchestrate"):
        assert any(part in line for line in leftovers.carriers), f"no {part!r} had the secrets"


def test_no_file_of_the_run_holds_a_secret(leftovers: Leftovers) -> None:
    assert found_in(files_below(leftovers.run_dir), leftovers.planted) == []


def test_no_file_of_the_ray_session_holds_a_secret(leftovers: Leftovers) -> None:
    assert found_in(files_below(leftovers.session), leftovers.planted) == []


def test_no_command_line_holds_a_secret(leftovers: Leftovers) -> None:
    lines = [(line.replace(b"\0", b" ").decode(errors="replace")[:200], line) for line in leftovers.command_lines]
    assert found_in(lines, leftovers.planted) == []


def test_nothing_that_is_shown_holds_a_secret(leftovers: Leftovers) -> None:
    assert found_in(leftovers.shown.items(), leftovers.planted) == []


def test_the_search_finds_a_secret_however_it_is_written(tmp_path: Path) -> None:
    planted = {"KEY": f"planted{secrets.token_hex(20)}"}
    for shift in range(3):
        (tmp_path / str(shift)).write_bytes(base64.b64encode(b"x" * shift + planted["KEY"].encode() + b"yz"))
    (tmp_path / "plain").write_bytes(b"\0" * 3_000_000 + planted["KEY"].encode())
    assert {where.rpartition("/")[2] for where in found_in(files_below(tmp_path), planted)} == {
        "0 holds KEY", "1 holds KEY", "2 holds KEY", "plain holds KEY"
    }  # fmt: skip


class Processes:
    """While it is open, collects the command lines of all processes, and of those that have a secret in their env."""

    def __init__(self, secret: str) -> None:
        self.command_lines: set[bytes] = set()
        self.carriers: set[bytes] = set()
        self._secret = secret.encode()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Processes:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(0.3):
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):  # it has ended
                    line = (process / "cmdline").read_bytes()
                    self.command_lines.add(line)
                    if self._secret in (process / "environ").read_bytes():
                        self.carriers.add(line)


def files_below(directory: Path) -> Iterator[tuple[str, bytes]]:
    """Yields `(name, bytes)` of every file; W&B links to some of its logs."""
    for path in directory.rglob("*"):
        if path.is_file():
            yield str(path), path.read_bytes()


def found_in(texts: Iterable[tuple[str, bytes]], planted: dict[str, str]) -> list[str]:
    """Returns a line for each secret in each of `(name, bytes)`, plain or as base64; never the secret itself."""
    forms = [(name, form) for name, value in planted.items() for form in forms_of(value)]
    return sorted({f"{where} holds {name}" for where, text in texts for name, form in forms if form in text})


def forms_of(value: str) -> list[bytes]:
    """The value itself, and what base64 makes of its middle wherever it begins in a longer text."""
    raw = value.encode()
    shifted = [base64.b64encode(b"x" * shift + raw)[4:-4] for shift in range(3)]
    return [raw, *shifted]
