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
    with socket.socket() as probe:
        probe.bind((host, 0))  # a wrong host fails here and not for ever below
    while True:
        port = draw.randrange(LOWEST, HIGHEST)
        if is_free(host, port):
            return port


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen on this port of `host` now."""
    with socket.socket() as probe:
        # As servers do: connections that were closed a moment ago keep no port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError:
            return False
        return True
