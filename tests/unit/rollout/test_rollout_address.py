"""Development endpoints are used on this machine and on private networks only, unless somebody says otherwise."""

from __future__ import annotations

import socket

import pytest

from megatron_sip.config.cli import parse_config
from megatron_sip.config.validate_rollout import rollout_problems
from megatron_sip.errors import ServiceError
from megatron_sip.rollout.address import is_private, require_private

HERE = "--rollout-engine vllm --rollout-url http://127.0.0.1:8200/v1"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "10.1.2.3", "192.168.0.9", "fe80::1%eth0", "fd00::7"])
def test_private_addresses(address: str) -> None:
    assert is_private(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "0.0.0.0", "::", "2606:4700::1111"])
def test_other_addresses(address: str) -> None:
    assert not is_private(address)


def test_a_name_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"node3": ["10.0.0.3"], "outside": ["10.0.0.3", "8.8.8.8"]}

    def look_up(host: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        if host not in found:
            raise socket.gaierror("unknown")
        return [(0, 0, 0, "", (address, 0)) for address in found[host]]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    require_private("http://node3:8200/v1")
    with pytest.raises(ServiceError, match="--allow-insecure-rollout"):
        require_private("http://outside:8200/v1")
    with pytest.raises(ServiceError, match="no known host"):
        require_private("http://nowhere:8200/v1")


@pytest.mark.parametrize(
    "line",
    [
        "",
        HERE,
        f"{HERE} http://localhost:8201",
        f"{HERE} http://10.0.0.2:8200 --rollout-weights-dir /shared",
        f"{HERE} http://8.8.8.8:8200 --rollout-weights-dir /shared --allow-insecure-rollout",
        f"{HERE} --rollout-proof logprobs --rollout-tolerance 0.1",
        "--rollout-pipeline-groups 2 --pipeline-model-parallel-size 2",
    ],
)
def test_what_can_be_meant(line: str) -> None:
    assert not list(rollout_problems(parse_config(line.split())))


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--rollout-engine vllm", ["needs --rollout-url", "tools/serve_vllm.py --rollouts"]),
        ("--rollout-url http://127.0.0.1:1", ["--rollout-url is given", "leave --rollout-url out"]),
        ("--rollout-timeout 9 --rollout-proof logprobs", ["--rollout-timeout is given", "--rollout-proof is given"]),
        (f"{HERE} --rollout-batch-size 4", ["--rollout-batch-size 4"]),
        (f"{HERE} --rollout-memory-gib 2", ["--rollout-memory-gib 2"]),
        (f"{HERE} --rollout-pipeline-groups 2", ["--rollout-pipeline-groups 2"]),
        ("--rollout-pipeline-groups 2", ["--rollout-pipeline-groups 2", "--pipeline-model-parallel-size is 1"]),
        (f"{HERE} http://127.0.0.1:8200/v1", ["more than once"]),
        ("--rollout-engine vllm --rollout-url ftp://a", ["no http or https URL"]),
        ("--rollout-engine vllm --rollout-url http://8.8.8.8", ["public address", "--rollout-weights-dir is missing"]),
        ("--rollout-engine vllm --rollout-url http://node3", ["--rollout-weights-dir is missing"]),
        (f"{HERE} --rollout-weights-dir weights", ["no absolute path"]),
    ],
)
def test_what_cannot_be_meant_is_told(line: str, parts: list[str]) -> None:
    told = "\n".join(rollout_problems(parse_config(line.split())))
    assert all(part in told for part in parts), told
