"""Passes Ethernet frames between two network interfaces, later than they came, and drops some.

Does what `tc netem` does, for kernels that are built without it. Runs until it is killed; `hosts.py slow` starts it.
Frames pass with the kernel's own notes on checksums and segmentation, as a cable between them would pass them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import select
import socket
import time
from collections import deque

_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING = 263, 15, 23
_ETH_P_ALL = 0x0003
_LARGEST_FRAME_BYTES = 1 << 17  # 64 KiB of segments that the kernel has not cut yet, and headers
_BUFFER_BYTES = 64 << 20


def _open(interface: str) -> socket.socket:
    link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    link.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    link.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    for option in (33, 32):  # SO_RCVBUFFORCE, SO_SNDBUFFORCE
        link.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
    link.bind((interface, _ETH_P_ALL))
    link.setblocking(False)
    return link


def relay(first: socket.socket, second: socket.socket, delay_s: float, loss: float) -> None:
    """Passes frames both ways, for ever.

    Args:
        first: One end.
        second: The other end.
        delay_s: How long each frame is kept.
        loss: Share of the frames that are dropped, 0 to 1.
    """
    other = {first: second, second: first}
    waiting: deque[tuple[float, socket.socket, bytes]] = deque()
    while True:
        timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        ready, _, _ = select.select([first, second], [], [], timeout)
        for link in ready:
            with contextlib.suppress(OSError):  # nothing more to read, or the link is down
                for _ in range(256):
                    frame = link.recv(_LARGEST_FRAME_BYTES)
                    if random.random() >= loss:
                        waiting.append((time.monotonic() + delay_s, other[link], frame))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, link, frame = waiting.popleft()
            with contextlib.suppress(OSError):  # down or full: lost, as on a cable
                link.send(frame)


def main() -> None:
    """Entry of `slow_link.py FIRST SECOND --delay-ms D --loss PERCENT`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first")
    parser.add_argument("second")
    parser.add_argument("--delay-ms", type=float, required=True)
    parser.add_argument("--loss", type=float, default=0.0)
    arguments = parser.parse_args()
    first, second = _open(arguments.first), _open(arguments.second)
    os.write(1, b"ready\n")
    for number in (1, 2):
        os.dup2(0, number)  # the reader of these pipes goes away
    relay(first, second, arguments.delay_ms / 1000, arguments.loss / 100)


if __name__ == "__main__":
    main()
