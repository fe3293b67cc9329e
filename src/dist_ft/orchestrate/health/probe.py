"""What a preflight does on each node, inside a Ray task there. Torch-free: the sum over all nodes is a process.

Everything that is written lies in one scratch folder, which `clean_up` removes.
"""

from __future__ import annotations

import json
import netrc
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dist_ft.machine import count_gpus, nvidia_driver, size_of_shared_memory
from dist_ft.monitor.wandb_sink import resolve_mode
from dist_ft.orchestrate.health.judge import NodeFacts
from dist_ft.orchestrate.health.this_machine import nearest_existing
from dist_ft.orchestrate.workers.network import interface_of, rendezvous_env
from dist_ft.orchestrate.workers.nodes import is_listening
from dist_ft.storage.objects import open_store
from dist_ft.storage.urls import is_url

_AT_ONCE = 64
_NAMES_LIMIT_S = 5.0
_WAYS_LIMIT_S = 15.0
_WANDB_LIMIT_S = 5.0
_FIRST = "first"


@dataclass(frozen=True)
class NodeRef:
    """A node of the cluster.

    Attributes:
        label: What it is called in what the user sees.
        address: Its IP address.
        port: Where its raylet listens.
        host_name: What Ray knows of its name.
    """

    label: str
    address: str
    port: int
    host_name: str


def look(me: NodeRef, others: Sequence[NodeRef], output_dir: str | None, scratch: str) -> dict[str, Any]:
    """Returns the `NodeFacts` of this node as JSON, and leaves files in the scratch folder.

    Args:
        me: This node.
        others: All the others.
        output_dir: `run.output_dir`, or None.
        scratch: Name of the folder.
    """
    temp_dir, host_name = tempfile.gettempdir(), socket.gethostname()
    names = sorted({other.host_name for other in others} - {host_name})
    known = _all_of(_resolves, [host_name, *names], _NAMES_LIMIT_S)
    reached = _all_of(lambda node: is_listening(node.address, node.port), list(others), _WAYS_LIMIT_S)
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
        free_port=_free_port(),
    )
    return asdict(facts) | (_try_storage(me, output_dir, scratch) if output_dir is not None else {})


def unread(me: NodeRef, others: Sequence[NodeRef], output_dir: str, scratch: str) -> list[str]:
    """Returns the nodes whose files this one does not see, or not whole. After `look` has ended on all of them."""
    store = open_store(f"{_place(output_dir)}/{scratch}")
    missing = []
    for other in others:
        try:
            is_whole = store.read(_file_of(other)) == other.label.encode()
        except OSError:
            is_whole = False
        missing += [] if is_whole else [other.label]
    return missing


def clean_up(output_dir: str, scratch: str) -> None:
    """Removes what `look` has written. Called on every node: they may not share the directory after all."""
    if is_url(output_dir):
        with suppress(OSError):
            open_store(output_dir).delete(scratch)
    else:
        shutil.rmtree(Path(_place(output_dir)) / scratch, ignore_errors=True)


def all_reduce(
    me: NodeRef, rank: int, first: tuple[str, int], world_size: int, backend: str, num_bytes: int, limit_s: float
) -> dict[str, Any]:
    """Sums over all nodes in a process of its own; returns `{bytes_per_s}` or `{problem}`.

    Args:
        me: This node.
        rank: Its place among those that sum.
        first: Address and port at which rank 0 listens.
        world_size: How many they are.
        backend: gloo or nccl.
        num_bytes: How much is summed.
        limit_s: Of each wait inside; the whole takes at most twice as long.
    """
    arguments = [rank, world_size, *first, backend, num_bytes, limit_s]
    command = [sys.executable, "-m", "dist_ft.orchestrate.health.all_reduce", *map(str, arguments)]
    env = os.environ | rendezvous_env(me.address)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * limit_s, env=env)
    except subprocess.TimeoutExpired:
        return {"problem": f"not done within {2 * limit_s:g} s"}
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        words = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith((" ", "["))]
        return {"problem": (words or [f"exit status {done.returncode}"])[-1][:300]}


def ask_wandb(setting: str) -> dict[str, Any]:
    """Says where numbers will go, seen from the driver's node: the arguments of `preflight.check_wandb`."""
    mode = resolve_mode(setting)
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    host = urlsplit(url).hostname or url
    problem = None
    if mode == "online" and not (os.environ.get("WANDB_API_KEY") or _is_in_netrc(host)):
        problem = f"monitor.wandb={setting}, but the head has no WANDB_API_KEY"
    is_reached = mode == "online" and problem is None and _answers(url)
    return {"mode": mode, "problem": problem, "host": host, "is_reached": is_reached}


def _place(output_dir: str) -> str:
    """Returns where to try: the URL, or the nearest directory that exists."""
    return output_dir if is_url(output_dir) else str(nearest_existing(Path(output_dir)))


def _try_storage(me: NodeRef, output_dir: str, scratch: str) -> dict[str, Any]:
    place = _place(output_dir)
    found: dict[str, Any] = {"place": place}
    try:
        if not is_url(place):
            found["output_free_bytes"] = shutil.disk_usage(place).free
            (Path(place) / scratch).mkdir(exist_ok=True)
        store = open_store(f"{place}/{scratch}")
        store.put(_file_of(me), [me.label.encode()])
        own = f"own-{_file_of(me)}"
        if not store.create_exclusive(own, b"1") or store.create_exclusive(own, b"2"):
            found["storage_problem"] = "a second writer replaced a file"
        found["is_first"] = store.create_exclusive(_FIRST, me.label.encode())
    except OSError as error:
        found["storage_problem"] = error.strerror or str(error)
    return found


def _file_of(node: NodeRef) -> str:
    return f"{node.address}-{node.port}".replace(":", "_")


def _all_of(ask: Callable[[Any], bool], items: Sequence[Any], limit_s: float) -> list[bool]:
    """Asks for each item at the same time; what takes longer than the limit is a no."""
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


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def _is_in_netrc(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=_WANDB_LIMIT_S).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True
