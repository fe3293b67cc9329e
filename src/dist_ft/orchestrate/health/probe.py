"""Finds the facts of a node, inside a Ray task on it. Torch-free: the all-reduce runs in a separate process.

All files are written to one scratch folder, which `clean_up` removes.
"""

from __future__ import annotations

import json
import netrc
import os
import shutil
import socket
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from dist_ft.machine import OWN_PYTHON, count_gpus, nvidia_driver, size_of_shared_memory
from dist_ft.monitor.wandb_sink import resolve_mode
from dist_ft.orchestrate.health.facts import NodeFacts, NodeRef, SumResult, WandbFacts
from dist_ft.orchestrate.health.this_machine import nearest_existing
from dist_ft.orchestrate.workers.network import interface_of, rendezvous_env
from dist_ft.orchestrate.workers.nodes import is_listening
from dist_ft.storage.objects import open_store
from dist_ft.storage.urls import is_url

T = TypeVar("T")

_AT_ONCE = 64
_NAMES_LIMIT_S = 5.0
_CONNECTIONS_LIMIT_S = 15.0
_WANDB_LIMIT_S = 5.0
_FIRST = "first"


def probe_node(me: NodeRef, others: Sequence[NodeRef], output_dir: str | None, scratch: str) -> NodeFacts:
    """Return the facts of this node; leaves files in the scratch folder.

    Args:
        me: This node.
        others: The nodes that it tries to reach.
        output_dir: `run.output_dir`, or None.
        scratch: Name of the folder.
    """
    temp_dir, host_name = tempfile.gettempdir(), socket.gethostname()
    names = sorted({other.host_name for other in others} - {host_name})
    known = _ask_all(_resolves, [host_name, *names], _NAMES_LIMIT_S)
    reached = _ask_all(lambda other: is_listening(other.address, other.port), others, _CONNECTIONS_LIMIT_S)
    with socket.socket() as listener:
        listener.bind(("", 0))
        free_port = int(listener.getsockname()[1])
    facts = NodeFacts(
        shm_bytes=size_of_shared_memory(),
        temp_dir=temp_dir,
        temp_free_bytes=shutil.disk_usage(temp_dir).free,
        gpus=count_gpus(),
        driver=nvidia_driver(),
        interface=interface_of(me.address),
        host_name=host_name,
        knows_itself=known[0],
        unknown=[name for name, is_known in zip(names, known[1:], strict=True) if not is_known],
        unreached=[other.label for other, is_reached in zip(others, reached, strict=True) if not is_reached],
        free_port=free_port,
    )
    return facts if output_dir is None else _try_storage(facts, me, _existing(output_dir), scratch)


def find_unread(me: NodeRef, others: Sequence[NodeRef], output_dir: str, scratch: str) -> list[str]:
    """Return the nodes whose files this node does not see whole. Call it after `probe_node` has ended on all nodes."""
    store = open_store(f"{_existing(output_dir)}/{scratch}")
    missing = []
    for other in others:
        try:
            is_whole = store.read(_file_of(other)) == other.label.encode()
        except OSError:
            is_whole = False
        missing += [] if is_whole else [other.label]
    return missing


def clean_up(output_dir: str, scratch: str) -> None:
    """Remove what `probe_node` has written. Call it on every node, because they may not share the directory."""
    if is_url(output_dir):
        with suppress(OSError):
            open_store(output_dir).delete(scratch)
    else:
        shutil.rmtree(Path(_existing(output_dir)) / scratch, ignore_errors=True)


def all_reduce(
    me: NodeRef, rank: int, first: tuple[str, int], world_size: int, backend: str, num_bytes: int, limit_s: float
) -> SumResult:
    """Run this node's part of the all-reduce in a separate process.

    Args:
        me: This node.
        rank: Index of this node in the all-reduce.
        first: Address and port at which rank 0 listens.
        world_size: Number of nodes in the all-reduce.
        backend: gloo or nccl.
        num_bytes: Size of the summed tensor.
        limit_s: Limit of each wait inside; the call takes at most twice as long.
    """
    arguments = [rank, world_size, *first, backend, num_bytes, limit_s]
    command = [*OWN_PYTHON, "-m", "dist_ft.orchestrate.health.all_reduce", *map(str, arguments)]
    env = os.environ | rendezvous_env(me.address)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * limit_s, env=env)
    except subprocess.TimeoutExpired:
        return SumResult(problem=f"not done within {2 * limit_s:g} s")
    try:
        return SumResult(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        words = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith((" ", "["))]
        return SumResult(problem=(words or [f"exit status {done.returncode}"])[-1][:300])


def ask_wandb(setting: str) -> WandbFacts:
    """Return where numbers will go with this setting of `monitor.wandb`, seen from the driver's node."""
    mode = resolve_mode(setting)
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    facts = WandbFacts(mode, urlsplit(url).hostname or url)
    if mode != "online":
        return facts
    has_key = bool(os.environ.get("WANDB_API_KEY"))
    with suppress(OSError, netrc.NetrcParseError):
        has_key = has_key or netrc.netrc().authenticators(facts.host) is not None
    if not has_key:
        return replace(facts, problem=f"monitor.wandb={setting}, but the head has no WANDB_API_KEY")
    try:
        urllib.request.urlopen(url, timeout=_WANDB_LIMIT_S).close()
    except urllib.error.HTTPError:
        pass  # this is an answer, too
    except (OSError, ValueError):
        return facts
    return replace(facts, is_reached=True)


def _existing(output_dir: str) -> str:
    """Return the place to write a test file: the URL, or the nearest directory that exists."""
    return output_dir if is_url(output_dir) else str(nearest_existing(Path(output_dir)))


def _try_storage(facts: NodeFacts, me: NodeRef, nearest: str, scratch: str) -> NodeFacts:
    """Write the files that other nodes read, and add the results to the facts."""
    problem, free_bytes, is_first = None, None, False
    try:
        if not is_url(nearest):
            free_bytes = shutil.disk_usage(nearest).free
            (Path(nearest) / scratch).mkdir(exist_ok=True)
        store = open_store(f"{nearest}/{scratch}")
        store.put(_file_of(me), [me.label.encode()])
        own = f"own-{_file_of(me)}"
        if not store.create_exclusive(own, b"1") or store.create_exclusive(own, b"2"):
            problem = "a second writer replaced a file"
        is_first = store.create_exclusive(_FIRST, me.label.encode())
    except OSError as error:
        problem = error.strerror or str(error)
    return replace(facts, nearest_dir=nearest, output_free_bytes=free_bytes, storage_problem=problem, is_first=is_first)


def _file_of(node: NodeRef) -> str:
    return f"{node.address}-{node.port}".replace(":", "_")


def _ask_all(ask: Callable[[T], bool], items: Sequence[T], limit_s: float) -> list[bool]:
    """Ask for all items at the same time; an answer that takes longer than the limit counts as False."""
    pool = ThreadPoolExecutor(_AT_ONCE)
    asked = [pool.submit(ask, item) for item in items]
    wait(asked, limit_s)
    answers = [answer.done() and answer.result() for answer in asked]
    pool.shutdown(wait=False, cancel_futures=True)
    return answers


def _resolves(name: str) -> bool:
    try:
        return bool(socket.getaddrinfo(name, None))
    except OSError:
        return False
