"""Supervises a rank from a Ray worker: starts it, relays its messages, and sees its death at once. Torch-free."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

from dist_ft.errors import DistFtError, OutOfMemoryError, StaleAttemptError, WorkerCrashError
from dist_ft.layout import rank_log_name, stacks_name
from dist_ft.machine import num_cores
from dist_ft.messages import (
    Envelope,
    Heartbeat,
    Located,
    Message,
    NodeSampled,
    RankDone,
    RankFailed,
    RankStarted,
    Reply,
    decode_message,
)
from dist_ft.orchestrate.node_sample import NodeSampler
from dist_ft.orchestrate.workers.network import rendezvous_env
from dist_ft.orchestrate.workers.processes import Child, ForkServer, describe_exit, is_serving, num_oom_kills
from dist_ft.orchestrate.workers.stacks import dump_stacks
from dist_ft.run.attempt_spec import AttemptSpec, RankSpec
from dist_ft.run.place import node_dir, send_logs

T = TypeVar("T")

_HEARTBEAT_S = 0.25
_HEARTBEATS_PER_S = 1000  # from all workers together; one actor answers them easily


class CoordinatorClient(Protocol):
    """Connects a supervisor to the coordinator."""

    def handle(self, envelope: Envelope) -> Reply:
        """Deliver a message and wait for the answer; see `Coordinator.handle`."""
        ...


@dataclass(frozen=True)
class RankSlot:
    """Describes the place of a rank in its group and on its node.

    Attributes:
        rank: Index of the rank.
        world_size: Number of ranks.
        local_rank: Index on its node.
        local_world_size: Ranks on its node.
        node_ip: Address of its node.
        gpu_ids: Devices that Ray assigned; empty on CPU.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_ip: str
    gpu_ids: tuple[str, ...] = ()


def make_rank_spec(attempt: AttemptSpec, slot: RankSlot) -> RankSpec:
    """Return the specification of the rank in this slot."""
    # A rank sees only its own devices, so its device index is 0.
    env = {"CUDA_VISIBLE_DEVICES": ",".join(slot.gpu_ids)} if slot.gpu_ids else {}
    env |= rendezvous_env(slot.node_ip)
    threads = max(1, num_cores() // slot.local_world_size)
    local_rank = 0 if slot.gpu_ids else slot.local_rank
    return RankSpec(attempt, slot.rank, slot.world_size, local_rank, slot.node_ip, threads, env, slot.local_world_size)


def supervise(attempt: AttemptSpec, slot: RankSlot, coordinator: CoordinatorClient, starter: str) -> None:
    """Run one rank to its end.

    Args:
        attempt: The specification that all ranks share.
        slot: Place of the rank.
        coordinator: Receives the messages of the rank.
        starter: Socket of a fork server on this node.

    Raises:
        WorkerCrashError: The rank failed or died; the coordinator already knows.
        StaleAttemptError: A newer attempt has begun; the rank is ended.
    """

    def report(message: Message) -> Reply:
        return coordinator.handle(Envelope(attempt.run_id, attempt.attempt, slot.rank, message))

    sampler = NodeSampler(node_dir(attempt.run_dir).path, time.monotonic()) if slot.local_rank == 0 else None
    oom_kills = num_oom_kills()
    child = Child(starter, make_rank_spec(attempt, slot))
    heartbeat_s = max(_HEARTBEAT_S, slot.world_size / _HEARTBEATS_PER_S)
    here = node_dir(attempt.run_dir).path  # its files are sent to the run at the end, under the same names
    folder = f"logs/attempt-{attempt.attempt:04d}"
    log_name, stacks = f"{folder}/{rank_log_name(slot.rank)}", f"{folder}/stacks/{stacks_name(slot.rank)}"
    last: Message | None = None
    pid: int | None = None
    is_located = False
    try:
        while not child.is_closed:
            messages = [decode_message(data) for data in child.receive(heartbeat_s)]
            if not messages and not child.is_closed and isinstance(last, RankDone | RankFailed):
                continue  # it has sent its last message and is about to end
            last = messages[-1] if messages else last
            for message in [*(messages or [Heartbeat()]), *_samples(sampler, slot)]:
                if isinstance(message, RankStarted):
                    pid = message.pid
                reply = report(message)
                if reply.dump and not is_located and pid is not None:
                    reply = report(Located(dump_stacks(pid, here / log_name, here / stacks)))
                is_located = reply.dump
                if reply.abort is not None:
                    raise WorkerCrashError(f"rank {slot.rank} was ended: {reply.abort}")
                child.send(reply)
    finally:
        child.close()
        send_logs(attempt.run_dir, (log_name, stacks))
    if isinstance(last, RankDone):
        # Wait while a new group is to be formed: for Ray Train, a worker that returns has finished its work for good.
        while report(Heartbeat()).hold:
            time.sleep(heartbeat_s)
        return
    if isinstance(last, RankFailed):
        raise WorkerCrashError(f"rank {slot.rank}: {last.error['message']}")
    error: DistFtError = WorkerCrashError(
        f"rank {slot.rank} died ({describe_exit(child.exit_status)}); its log is {attempt.run_dir}/{log_name}"
    )
    if child.exit_status == -signal.SIGKILL and num_oom_kills() > oom_kills:
        error = OutOfMemoryError(f"rank {slot.rank} was ended by the system, which has run out of memory")
    with contextlib.suppress(StaleAttemptError):
        report(RankFailed(error.to_dict(), is_death=True))
    raise error


def _samples(sampler: NodeSampler | None, slot: RankSlot) -> list[Message]:
    """Return what the node is doing, if it is time for that and this is the supervisor that says it."""
    numbers = sampler.sample(time.monotonic()) if sampler is not None else None
    return [] if numbers is None else [NodeSampled(slot.node_ip, numbers)]


@contextlib.contextmanager
def starter_on_node(known: str | None, on_gpu: bool) -> Iterator[str]:
    """Yield the socket of this node's fork server, or of a new one for this rank alone (slower)."""
    if known is not None and is_serving(known):
        yield known
        return
    server = ForkServer(on_gpu)
    try:
        yield server.socket_path
    finally:
        server.close()


def wait_for_spec(fetch: Callable[[], T | None], limit_s: float) -> T:
    """Return the first value of `fetch` that is not None; the coordinator has one when the preparation is done."""
    deadline = time.monotonic() + limit_s
    while (found := fetch()) is None:
        if time.monotonic() > deadline:
            raise WorkerCrashError(f"the coordinator had nothing to do for {limit_s:.0f} s")
        time.sleep(0.05)
    return found
