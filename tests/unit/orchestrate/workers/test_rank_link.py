"""What a rank says reaches its supervisor, or the rank ends."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable

from dist_ft.messages import Envelope, EvalDone, RankStarted
from dist_ft.metric_rows import EvalRow
from dist_ft.orchestrate.workers.child import SocketLink


def _in_a_child(send: Callable[[SocketLink], None]) -> tuple[int, bytes]:
    """Forks a process that sends over a link; returns its exit status and what arrived."""
    here, there = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        here.close()
        link = SocketLink(there, there.makefile("rb"))
        send(link)
        link.flush()
        os._exit(0)
    there.close()
    here.settimeout(60)
    received = here.makefile("rb").read()
    here.close()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), received


def test_a_row_arrives_as_it_was_sent() -> None:
    message = EvalDone(EvalRow(step=4, attempt=1, metrics={"eval_loss": 0.5}))
    status, line = _in_a_child(lambda link: link.send(message))
    sender = {"run_id": "run-1", "attempt": 1, "rank": 0}
    assert status == 0
    assert Envelope.from_dict({**sender, **json.loads(line)}).message == message


def test_a_rank_that_cannot_report_ends() -> None:
    def send(link: SocketLink) -> None:
        link.send(RankStarted(0, object()))  # type: ignore[arg-type]
        time.sleep(60)  # the rank trains on; its end must not wait for it

    status, line = _in_a_child(send)
    assert (status, line) == (1, b"")
