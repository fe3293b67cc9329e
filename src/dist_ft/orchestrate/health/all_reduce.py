"""Checks an all-reduce over all nodes, one process per node: that the group forms, that the sum is right, its speed.

`python -m dist_ft.orchestrate.health.all_reduce RANK WORLD_SIZE HOST PORT BACKEND` … prints
`{"bytes_per_s": …}` as its last line. Every rank calls it; rank 0 listens at HOST:PORT. It leaves nothing behind.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

NUM_ROUNDS = 3


def measure(rank: int, world_size: int, host: str, port: int, backend: str, num_bytes: int, limit_s: float) -> float:
    """Return the bytes a second that each process sends and receives. Collective.

    Raises:
        RuntimeError: The group did not form, broke, or the sum is wrong.
    """
    limit = timedelta(seconds=limit_s)
    store = dist.TCPStore(host, port, world_size, is_master=rank == 0, timeout=limit)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    numbers = torch.empty(num_bytes // 4, device=device)
    took = float("inf")
    for _ in range(NUM_ROUNDS):
        numbers.fill_(1.0)
        began = time.perf_counter()
        dist.all_reduce(numbers)
        lowest, highest = float(numbers.min()), float(numbers.max())  # also waits for the device
        if not lowest == highest == world_size:
            raise RuntimeError(f"the sum of {world_size} ones is between {lowest} and {highest}")
        took = min(took, time.perf_counter() - began)
    dist.barrier()
    dist.destroy_process_group()
    # The bytes that each process sends in a ring all-reduce; a single process sends nothing.
    return num_bytes * max(1.0, 2 * (world_size - 1) / world_size) / took


if __name__ == "__main__":
    _rank, _world_size, _host, _port, _backend, _num_bytes, _limit_s = sys.argv[1:]
    speed = measure(int(_rank), int(_world_size), _host, int(_port), _backend, int(_num_bytes), float(_limit_s))
    print(json.dumps({"bytes_per_s": speed}))
