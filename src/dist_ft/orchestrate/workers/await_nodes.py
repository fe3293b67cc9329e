"""Waits for a number of Ray nodes: `python -m dist_ft.orchestrate.workers.await_nodes HOST:PORT COUNT LIMIT_S`.

Scripts that start the nodes call it. It reads Ray's table of nodes directly, because joining as a driver takes seconds
each time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import ray

_EVERY_S = 0.5


def await_nodes(count: Callable[[], int], wanted: int, limit_s: float) -> int:
    """Return the number of nodes when it is the wanted one, or at the end of the limit.

    Args:
        count: Counts the nodes; raises while Ray does not answer.
        wanted: Number of nodes to wait for.
        limit_s: Seconds to wait.
    """
    deadline, found = time.monotonic() + limit_s, 0
    while found < wanted and time.monotonic() < deadline:
        try:
            found = count()
        except Exception:  # Ray does not answer yet; it raises many types
            found = 0
        if found < wanted:
            time.sleep(_EVERY_S)
    return found


def _num_alive(address: str) -> int:
    nodes = ray._raylet.GcsClient(address=address).get_all_node_info().values()
    return sum(node.state == 0 for node in nodes)  # GcsNodeInfo.ALIVE


def main() -> None:
    """Run the command; exit with code 1 if some nodes are missing at the end of the limit."""
    address, wanted, limit_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    found = await_nodes(lambda: _num_alive(address), wanted, limit_s)
    print(f"{found} of {wanted} Ray nodes at {address}", flush=True)
    sys.exit(found < wanted)


if __name__ == "__main__":
    main()
