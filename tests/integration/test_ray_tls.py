"""A Ray with TLS and token (docs/security.md): a task and a run of dist-ft on it, and peers that it does not let in."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from dist_ft.layout import RunDir
from dist_ft.storage.publish import read_json
from tests.helpers import certificates
from tests.helpers.ray_head import RayHead
from tests.helpers.runs import CONFIG

pytestmark = pytest.mark.timeout(600)  # a head and a run

_TASK = """
import logging, sys, ray
ray.init(address=sys.argv[1], logging_level=logging.ERROR, log_to_driver=False)
print(ray.get(ray.remote(lambda: 6 * 7).remote()))
"""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    head = RayHead(env=certificates.make(tmp_path_factory.mktemp("tls") / "right", "the cluster's"))
    yield head
    head.close()


def test_a_client_with_a_certificate_of_the_cluster_runs_a_task(head: RayHead) -> None:
    command = [sys.executable, "-c", _TASK, f"{certificates.addresses()[-1]}:{head.gcs_port}"]
    done = subprocess.run(command, env=head.env, capture_output=True, text=True, timeout=90, check=False)
    assert done.stdout.strip() == "42", done.stderr


def first_words(head: RayHead, own: Mapping[str, str]) -> bytes:
    """What the GCS says to a peer with the certificate that Ray's variables in `own` name; nothing: it hangs up.

    Below Ray, whose own client tries for minutes and gives no reason.
    """
    context = ssl.create_default_context(cafile=head.env["RAY_TLS_CA_CERT"])
    context.set_alpn_protocols(["h2"])
    if own:
        context.load_cert_chain(own["RAY_TLS_SERVER_CERT"], own["RAY_TLS_SERVER_KEY"])
    with (
        socket.create_connection(("127.0.0.1", head.gcs_port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        return connection.recv(100)


def test_a_peer_without_a_certificate_or_with_anothers_is_refused_before_it_can_show_a_token(
    head: RayHead, tmp_path: Path
) -> None:
    assert first_words(head, head.env).startswith(b"\0"), "the cluster's own certificate is answered with a frame"
    assert first_words(head, {}) == b""
    assert first_words(head, certificates.make(tmp_path / "wrong", "somebody's")) == b""


def test_a_peer_that_speaks_in_the_open_gets_no_answer(head: RayHead) -> None:
    with socket.create_connection(("127.0.0.1", head.gcs_port), timeout=10) as plain:
        plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(5) + b"\x04" + bytes(3))
        with contextlib.suppress(ConnectionResetError):
            assert not plain.recv(100).startswith(b"\0"), "no HTTP/2 frame"


def test_a_run_of_dist_ft_goes_over_tls(head: RayHead, cli: str, tmp_path: Path) -> None:
    command = [
        cli, "submit", str(CONFIG), "--to", "ray", "--follow", "--address", head.url, f"run.output_dir={tmp_path}",
        "run.name=r", "data.eval=null", "monitor.wandb=disabled", "train.max_steps=4", "checkpoint.every_steps=2",
    ]  # fmt: skip
    done = subprocess.run(command, env=head.env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_json(RunDir(tmp_path / "r").run_json)["state"] == "completed"
