"""https: whose certificates are believed, and that a key is not told to a server that has none of them."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
import trustme
from fake_server import FakeServer, chat_body
from test_services_client import KEY, post, settings

from megatron_sip.config.groups import Config, JudgeConfig
from megatron_sip.config.validate_preference import preference_problems
from megatron_sip.errors import ConfigError
from megatron_sip.services.client import ServiceClient
from megatron_sip.services.settings import judge_settings, rewriter_settings
from megatron_sip.types import Missing, MissingReason


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def ca_file(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tls") / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return str(path)


def context_of(authority: trustme.CA, name: str = "127.0.0.1") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


def test_a_private_authority_is_believed_when_it_is_named(authority: trustme.CA, ca_file: str) -> None:
    with FakeServer(tls=context_of(authority), key=KEY) as server:
        assert server.url.startswith("https://")
        [answer] = post(settings(server.url, ca_file=ca_file), {"JUDGE_API_KEY": KEY})
        assert answer == chat_body("Conclusion: option 1")


def test_an_unknown_authority_is_refused_before_the_key_is_sent(authority: trustme.CA) -> None:
    with FakeServer(tls=context_of(authority), key=KEY) as server:
        [missing] = post(settings(server.url), {"JUDGE_API_KEY": KEY})
        assert isinstance(missing, Missing)
        assert missing.reason is MissingReason.CONNECTION
        assert "certificate verify failed" in missing.detail
        assert KEY not in missing.detail
        assert server.headers == []


def test_a_certificate_of_another_host_is_refused(authority: trustme.CA, ca_file: str) -> None:
    with FakeServer(tls=context_of(authority, "judge.example.org")) as server:
        [missing] = post(settings(server.url, ca_file=ca_file))
        assert isinstance(missing, Missing)
        assert missing.reason is MissingReason.CONNECTION
        assert server.headers == []


def test_the_usual_variable_counts_too(authority: trustme.CA, ca_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", ca_file)
    with FakeServer(tls=context_of(authority)) as server:
        [answer] = post(settings(server.url))
        assert isinstance(answer, dict)


def test_a_file_without_certificates_is_told(tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("nothing\n")
    for path in (empty, tmp_path / "absent.pem"):
        with pytest.raises(ConfigError, match=r"--judge-ca-file .*\.pem"):
            ServiceClient(settings("https://127.0.0.1:1/v1", ca_file=str(path)), {})


def test_the_flag_holds_for_judge_and_rewriter_and_is_checked(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent.pem")
    config = Config(judge=JudgeConfig(judge_url=("https://a/v1",), judge_ca_file=absent))
    assert judge_settings(config.judge).ca_file == rewriter_settings(config).ca_file == absent
    assert [problem for problem in preference_problems(config) if "--judge-ca-file" in problem]
