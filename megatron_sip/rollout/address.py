"""Where the rollout servers are, and whether their development endpoints may be there.

Those endpoints take new weights, and let anybody who reaches them run code in the server: vLLM's key guards only what
is below /v1. So they must be out of the reach of strangers.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

from megatron_sip.errors import ServiceError
from megatron_sip.services.endpoint import is_loopback

_PUBLIC = (
    "is at a public address, and whoever reaches the development endpoints of a vLLM server can run code there; "
    "use a private network, or say --allow-insecure-rollout where a firewall keeps strangers away"
)


def all_local(urls: tuple[str, ...]) -> bool:
    """Whether every server is on this machine."""
    return all(is_loopback(urlsplit(url).hostname) for url in urls)


def public_addresses(urls: tuple[str, ...]) -> Iterator[str]:
    """A sentence for each URL whose host is a public address by what is written; names are not resolved."""
    for url in urls:
        try:
            private = is_private(urlsplit(url).hostname or "")
        except ValueError:  # a name, or no URL at all, which is told elsewhere
            continue
        if not private:
            yield f"--rollout-url {url} {_PUBLIC}"


def is_private(address: str) -> bool:
    """Whether an IP address is of this machine or of a private network.

    Raises:
        ValueError: it is no IP address.
    """
    found = ipaddress.ip_address(address.partition("%")[0])
    return (found.is_loopback or found.is_private or found.is_link_local) and not found.is_unspecified


def require_private(base: str) -> None:
    """Refuse a server whose name leads to a public address.

    Raises:
        ServiceError: it does, or leads nowhere.
    """
    host = urlsplit(base).hostname or ""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ServiceError(f"--rollout-url {base}: {host} is no known host ({error}); correct the name") from error
    if not all(is_private(str(entry[4][0])) for entry in found):
        raise ServiceError(f"--rollout-url {base} {_PUBLIC}")
