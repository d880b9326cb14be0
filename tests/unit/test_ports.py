"""Ports: free ones, outside what the system gives to outgoing connections."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sip.ports import free_port, is_free

ROOT = Path(__file__).resolve().parents[2]


def test_a_free_port_is_free_and_no_outgoing_connection_takes_it() -> None:
    lowest_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(200):
        port = free_port()
        assert 1024 < port < lowest_outgoing
        assert is_free("127.0.0.1", port)


def test_a_port_in_use_is_not_free_and_free_again_after() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not is_free("127.0.0.1", port)
        client = socket.create_connection(("127.0.0.1", port))
        server.accept()[0].close()  # closed first on this side, so the port rests in TIME_WAIT
        client.close()
    assert is_free("127.0.0.1", port)


@pytest.mark.parametrize("host", ["localhost", "0.0.0.0", "::1"])
def test_other_ways_to_name_this_machine(host: str) -> None:
    if ":" in host and not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    assert is_free(host, free_port(host))


def test_a_foreign_host_is_an_error_and_no_endless_search() -> None:
    with pytest.raises(OSError, match="assign"):
        free_port("192.0.2.1")


def test_it_needs_the_standard_library_only() -> None:
    code = "import megatron_sip.ports as p; print(p.free_port())"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
