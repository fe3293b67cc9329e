#!/usr/bin/env python3
"""Reads of the fine-tuning service under load, with a small and a large index.

    python benchmarks/service.py [--jobs 10000] [--events 1000000] [--seconds 20] [--rate 300] [--json FILE]

Two servers of one process each, one with 40 jobs, one with many; both get the same open loop in turn: requests start at
a fixed rate over 50 connections, whether or not earlier ones were answered, and the time of each counts from when it
should have started. Two of three read one job, the others a page of 20 jobs or of 20 events.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sqlalchemy as sql

from dist_ft.service.api_keys import add_key
from dist_ft.service.api_server import Settings, open_index
from dist_ft.service.index import EVENTS, OBJECTS
from dist_ft.service.tuning.job_request import read_request
from dist_ft.service.tuning.job_store import JobRecord

CONNECTIONS = 50
SMALL = 40  # so that its pages are full, too


def fill(store: Path, jobs: int, events: int) -> tuple[str, list[str]]:
    """Fill an index with jobs that are over; return a key and the jobs' ids."""
    index = open_index(Settings(store))
    ids = [f"ftjob-{n:024d}" for n in range(jobs)]
    request = read_request({"model": "tiny-random", "training_file": "file-1"})
    records = (
        JobRecord(
            id=name, project="default", created_at=1, request=request, base="tiny-random", start_job=None,
            start_step=None, settings=request.hyperparameters, tuned_name=f"ft:{name}", status="succeeded",
        )
        for name in ids
    )  # fmt: skip
    rows = [
        {"kind": "job", "id": r.id, "project": r.project, "label": r.status, "data": json.dumps(asdict(r))}
        for r in records
    ]
    with index.writing() as connection:
        connection.execute(sql.insert(OBJECTS), rows)
        for begin in range(0, events, 50_000):
            made = [
                {"job": ids[n % jobs], "id": f"ftevent-{n}", "data": json.dumps(event(n))}
                for n in range(begin, min(events, begin + 50_000))
            ]
            connection.execute(sql.insert(EVENTS), made)
    key = add_key(index, "admin", "default", "load", None)
    index.close()
    return key, ids


def event(number: int) -> dict[str, Any]:
    """Return the event of a step."""
    return {
        "object": "fine_tuning.job.event", "id": f"ftevent-{number}", "created_at": 1, "level": "info",
        "message": f"Step {number}: training loss=0.50", "type": "metrics", "data": {"step": number},
    }  # fmt: skip


class Server:
    """`dist-ft serve-api` in a process of its own."""

    def __init__(self, store: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "dist_ft.cli", "serve-api", "--store", str(store), "--port", str(self.port)]
        self.process = subprocess.Popen([*command, "--launcher", "local"], stderr=subprocess.DEVNULL)
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health").close()
                return
            except OSError:
                time.sleep(0.1)

    def memory_mib(self) -> float:
        """Return its resident memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * 4096 / 2**20

    def cpu_s(self) -> float:
        """Return the processor's seconds that it has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(60)


async def load(port: int, key: str, ids: list[str], rate: float, seconds: float) -> list[float]:
    """Return the milliseconds of each request, from when it should have begun."""
    chosen = random.Random(1)
    queue: asyncio.Queue[tuple[float, str] | None] = asyncio.Queue()
    taken: list[float] = []

    async def connection() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (due := await queue.get()) is not None:
            writer.write(f"GET {due[1]} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {key}\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            taken.append((time.perf_counter() - due[0]) * 1e3)
        writer.close()

    workers = [asyncio.create_task(connection()) for _ in range(CONNECTIONS)]
    began = time.perf_counter()
    for number in range(int(rate * seconds)):
        at = began + number / rate
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        job = f"/v1/fine_tuning/jobs/{chosen.choice(ids)}"
        page = f"/v1/fine_tuning/jobs?limit=20&after={chosen.choice(ids[1:])}"
        queue.put_nowait((at, chosen.choice([job, job, job, job, page, f"{job}/events?limit=20"])))
    for _ in workers:
        queue.put_nowait(None)
    await asyncio.gather(*workers)
    return taken


def main() -> None:
    """Print the figures of each round, and of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rate", type=float, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="dist-ft-load-") as folder:
        sides = {}
        for name, jobs, events in (("small", SMALL, SMALL * 100), ("large", given.jobs, given.events)):
            key, ids = fill(Path(folder) / name, jobs, events)
            sides[name] = (Server(Path(folder) / name), key, ids)
        try:
            rounds: dict[str, list[list[float]]] = {name: [] for name in sides}
            for _ in range(given.rounds):
                for name, (server, key, ids) in sides.items():
                    before = server.cpu_s()
                    taken = sorted(asyncio.run(load(server.port, key, ids, given.rate, given.seconds)))
                    cpu_ms = (server.cpu_s() - before) / len(taken) * 1e3
                    rounds[name].append([*(taken[int(len(taken) * part)] for part in (0.5, 0.95, 0.99)), cpu_ms])
                    print(
                        name, len(taken), "requests, ms:", [round(value, 1) for value in rounds[name][-1]], flush=True
                    )
            for name, (server, _, _) in sides.items():
                middle = [statistics.median(values) for values in zip(*rounds[name], strict=True)]
                numbers = dict(zip(("p50_ms", "p95_ms", "p99_ms", "cpu_ms_a_request"), middle, strict=True))
                found[name] = {**numbers, "memory_mib": server.memory_mib()}
                print(name, {key: round(value, 1) for key, value in found[name].items()})
        finally:
            for server, _, _ in sides.values():
                server.close()
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
