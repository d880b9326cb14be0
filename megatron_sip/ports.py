"""Ports of this machine. The standard library alone: the launcher of the judge runs without our environment."""

from __future__ import annotations

import random
import socket

LOWEST, HIGHEST = 15000, 32000


def free_port(host: str = "127.0.0.1") -> int:
    """A port of `host` that nobody listens on, below those that Linux gives to outgoing connections (32768 on).

    One of those could be taken in the seconds until a server that was told of it listens there.

    Raises:
        OSError: `host` is no address of this machine.
    """
    draw = random.SystemRandom()
    _listen(host, 0)  # a wrong host fails here and not for ever below
    while True:
        port = draw.randrange(LOWEST, HIGHEST)
        if is_free(host, port):
            return port


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen on this port of `host` now."""
    try:
        _listen(host, port)
    except OSError:
        return False
    return True


def _listen(host: str, port: int) -> None:
    """Listen for a moment, by IPv4 or IPv6; OSError where that cannot be."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    with socket.socket(family, kind, protocol) as probe:
        # As servers do: connections that were closed a moment ago keep no port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
        probe.listen(1)
