"""`dist-ft serve` on a Ray of its own: names, streams, a replica that dies, the end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai import OpenAI

from tests.helpers.api_server import wait_for
from tests.helpers.paths import ROOT
from tests.helpers.served import make_adapter, make_base


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def served(log: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], OpenAI]]:
    """Runs `dist-ft serve` until the block ends."""
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "dist_ft.cli", "serve", *arguments, "--port", str(port)],
            stdout=output, stderr=output, env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        )  # fmt: skip
    try:
        wait_for(lambda: b"serving" in log.read_bytes() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield process, OpenAI(api_key="any", base_url=f"http://127.0.0.1:{port}/v1", max_retries=4, timeout=120)
    finally:
        process.terminate()
        assert process.wait(60) == 0, log.read_text()


def replica_of(process: subprocess.Popen[bytes]) -> int:
    """Returns the process of the replica, a grandchild of the command."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            if b"ray::ServeReplica:dist-ft:Replica" in (entry / "cmdline").read_bytes():
                raylet = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if int((Path("/proc") / str(raylet) / "stat").read_text().rpartition(")")[2].split()[1]) == process.pid:
                    found.append(int(entry.name))
    (pid,) = found
    return pid


def test_an_adapter_and_its_base_and_a_replica_that_dies(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    tuned = make_adapter(base, tmp_path / "tuned", 1)
    with served(tmp_path / "log", str(tuned)) as (process, client):
        assert [model.id for model in client.models.list()] == ["tuned", "base"]
        texts = [client.completions.create(model=m, prompt="red", temperature=0).choices[0].text for m in
                 ("tuned", "base")]  # fmt: skip
        assert texts[0] != texts[1]
        no_end = {"256": -100, "257": -100, "258": -100}
        stream = client.completions.create(
            model="tuned", prompt="red", max_tokens=2000, stream=True, logit_bias=no_end, temperature=0
        )
        next(iter(stream))
        os.kill(replica_of(process), signal.SIGKILL)
        with pytest.raises(openai.APIError, match="lost"):
            list(stream)
        again = client.completions.create(model="tuned", prompt="red", temperature=0)
        assert again.choices[0].text == texts[0]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((), "--store"), (("/nowhere",), "/nowhere is not there"), (("a", "--store", "b"), "one of them"),
        (("a", "--engine", "vllm"), "vllm"), (("a", "--engine", "x"), "none of auto, torch, vllm"),
        (("a", "--replicas", "0"), "--replicas 0"), ((".", "--host", "0.0.0.0"), "open to others"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_said_at_once(arguments: tuple[str, ...], why: str) -> None:
    from typer.testing import CliRunner

    from dist_ft.cli.app import app

    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code and why in str(result.exception), result
