"""A Ray worker's side of a rank: starts it, relays its words, sees its death at once. Torch-free."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from dist_ft.errors import DistFtError, OutOfMemoryError, StaleAttemptError, WorkerCrashError
from dist_ft.layout import rank_log_name, stacks_name
from dist_ft.machine import num_cores
from dist_ft.messages import (
    AttemptSpec,
    Envelope,
    Heartbeat,
    Located,
    Message,
    RankDone,
    RankFailed,
    RankSpec,
    RankStarted,
    Reply,
)
from dist_ft.orchestrate.workers.network import rendezvous_env
from dist_ft.orchestrate.workers.processes import Child, ForkServer, describe_exit, is_serving, num_oom_kills
from dist_ft.orchestrate.workers.stacks import dump_stacks
from dist_ft.run.place import node_dir, send_logs

_HEARTBEAT_S = 0.25
_HEARTBEATS_PER_S = 1000  # of all workers together, which one actor answers easily


class CoordinatorClient(Protocol):
    """How a supervisor reaches the coordinator."""

    def handle(self, envelope: dict[str, Any]) -> dict[str, Any]:
        """See `Coordinator.handle`; blocks for the answer."""
        ...


@dataclass(frozen=True)
class RankSlot:
    """The place of a rank in its group and on its node.

    Attributes:
        rank: Its index.
        world_size: Number of ranks.
        local_rank: Index on its node.
        local_world_size: Ranks on its node.
        node_ip: Address of its node.
        gpu_ids: Devices given by Ray; empty on CPU.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_ip: str
    gpu_ids: tuple[str, ...] = ()


def make_rank_spec(attempt: AttemptSpec, slot: RankSlot) -> RankSpec:
    """Returns what the rank in this slot is told."""
    # A rank sees its own devices only, so its device index is 0.
    env = {"CUDA_VISIBLE_DEVICES": ",".join(slot.gpu_ids)} if slot.gpu_ids else {}
    env |= rendezvous_env(slot.node_ip)
    threads = max(1, num_cores() // slot.local_world_size)
    local_rank = 0 if slot.gpu_ids else slot.local_rank
    return RankSpec(attempt, slot.rank, slot.world_size, local_rank, slot.node_ip, threads, env)


def supervise(attempt: AttemptSpec, slot: RankSlot, coordinator: CoordinatorClient, starter: str) -> None:
    """Runs one rank to its end.

    Args:
        attempt: What all ranks share.
        slot: Its place.
        coordinator: Where its messages go.
        starter: Socket of a fork server on this node.

    Raises:
        WorkerCrashError: The rank failed or died; the coordinator knows already.
        StaleAttemptError: A newer attempt has begun; the rank is ended.
    """
    oom_kills = num_oom_kills()
    child = Child(starter, {"entry": "rank", "spec": make_rank_spec(attempt, slot).to_dict()})
    heartbeat_s = max(_HEARTBEAT_S, slot.world_size / _HEARTBEATS_PER_S)
    logs = node_dir(attempt.run_dir).logs(attempt.attempt)
    log = logs / rank_log_name(slot.rank)
    # Where they end, and are looked for.
    folder = f"logs/attempt-{attempt.attempt:04d}"
    log_name, stacks = f"{folder}/{rank_log_name(slot.rank)}", f"{folder}/stacks/{stacks_name(slot.rank)}"
    last: Message | None = None
    pid: int | None = None
    is_located = False
    try:
        while not child.is_closed:
            messages = child.receive(heartbeat_s)
            if not messages and not child.is_closed and isinstance(last, RankDone | RankFailed):
                continue  # it has said its last word and is on its way out
            for data in messages or [{"kind": Heartbeat.kind, "body": {}}]:
                envelope = Envelope.from_dict(
                    {"run_id": attempt.run_id, "attempt": attempt.attempt, "rank": slot.rank, **data}
                )
                if not isinstance(envelope.message, Heartbeat):
                    last = envelope.message
                if isinstance(last, RankStarted):
                    pid = last.pid
                reply = Reply.from_dict(coordinator.handle(envelope.to_dict()))
                if reply.dump and not is_located and pid is not None:
                    found = Located(dump_stacks(pid, log, logs / "stacks" / stacks_name(slot.rank)))
                    located = Envelope(attempt.run_id, attempt.attempt, slot.rank, found)
                    reply = Reply.from_dict(coordinator.handle(located.to_dict()))
                is_located = reply.dump
                if reply.abort is not None:
                    raise WorkerCrashError(f"rank {slot.rank} was ended: {reply.abort}")
                child.send(reply.to_dict())
    finally:
        child.close()
        send_logs(attempt.run_dir, (log_name, stacks))
    if isinstance(last, RankDone):
        _keep_place(attempt, slot, coordinator, heartbeat_s)
        return
    if isinstance(last, RankFailed):
        raise WorkerCrashError(f"rank {slot.rank}: {last.error['message']}")
    error: DistFtError = WorkerCrashError(
        f"rank {slot.rank} died ({describe_exit(child.exit_status)}); its log is {attempt.run_dir}/{log_name}"
    )
    if child.exit_status == -signal.SIGKILL and num_oom_kills() > oom_kills:
        error = OutOfMemoryError(f"rank {slot.rank} was ended by the system, which has run out of memory")
    with contextlib.suppress(StaleAttemptError):
        report = Envelope(attempt.run_id, attempt.attempt, slot.rank, RankFailed(error.to_dict(), is_death=True))
        coordinator.handle(report.to_dict())
    raise error


def _keep_place(attempt: AttemptSpec, slot: RankSlot, coordinator: CoordinatorClient, heartbeat_s: float) -> None:
    """Stays while the group is to be formed anew: for Ray Train a worker that returns has done its work for good."""
    heartbeat = Envelope(attempt.run_id, attempt.attempt, slot.rank, Heartbeat()).to_dict()
    while Reply.from_dict(coordinator.handle(heartbeat)).hold:
        time.sleep(heartbeat_s)


@contextlib.contextmanager
def starter_on_node(known: str | None, on_gpu: bool) -> Iterator[str]:
    """Gives the socket of this node's fork server, or of one made for this rank alone (slower)."""
    if known is not None and is_serving(known):
        yield known
        return
    server = ForkServer(on_gpu)
    try:
        yield server.socket_path
    finally:
        server.close()


def wait_for_spec(fetch: Any, limit_s: float) -> Any:
    """Polls until the coordinator has something to give (the preparation is done)."""
    deadline = time.monotonic() + limit_s
    while (found := fetch()) is None:
        if time.monotonic() > deadline:
            raise WorkerCrashError(f"the coordinator had nothing to do for {limit_s:.0f} s")
        time.sleep(0.05)
    return found
