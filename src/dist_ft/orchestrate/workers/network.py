"""Finds the network interface that an address belongs to. Linux only; elsewhere the answer is None."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import sys

_SIOCGIFADDR = 0x8915


def interface_of(address: str) -> str | None:
    """Return the name of the interface with this IPv4 address, or None.

    Otherwise gloo binds to the address of the host's name, often 127.0.0.1, which no other machine can reach.
    """
    if not sys.platform.startswith("linux"):
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                request = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def rendezvous_env(address: str) -> dict[str, str]:
    """Return the environment variables that make gloo and NCCL use the interface of this address.

    Variables that are already set on the machine are not changed.
    """
    interface = interface_of(address)
    if interface is None:
        return {}
    return {name: os.environ.get(name, interface) for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
