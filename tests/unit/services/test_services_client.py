"""The client against every odd answer: a parsed object or Missing with the right reason, inside one deadline."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from fake_server import (
    FakeServer,
    Handler,
    chat_body,
    drip,
    flood,
    hang,
    raw,
    redirect,
    reset,
    reset_in_body,
    respond,
    status,
)

from megatron_sip.errors import ConfigError, ServiceError
from megatron_sip.services.client import ServerInfo, ServiceClient
from megatron_sip.services.endpoint import ClientSettings, Secret
from megatron_sip.services.transport import parse_retry_after
from megatron_sip.types import Missing, MissingReason

KEY = "sk-very-secret-123"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running


def settings(*urls: str, **changes: Any) -> ClientSettings:
    return ClientSettings(urls=urls, **{"timeout": 5.0, "retries": 0, **changes})


def post(
    config: ClientSettings, environ: dict[str, str] | None = None, times: int = 1
) -> list[dict[str, Any] | Missing]:
    """`times` calls one after the other."""

    async def run() -> list[dict[str, Any] | Missing]:
        client = ServiceClient(config, environ or {})
        await client.open()
        try:
            return [await client.post("/chat/completions", {"messages": []}) for _ in range(times)]
        finally:
            await client.close()

    return asyncio.run(run())


def check(config: ClientSettings, environ: dict[str, str] | None = None) -> ServerInfo:
    async def run() -> ServerInfo:
        client = ServiceClient(config, environ or {})
        await client.open()
        try:
            return await client.check()
        finally:
            await client.close()

    return asyncio.run(run())


def test_a_good_answer_is_the_parsed_object(server: FakeServer) -> None:
    [answer] = post(settings(server.url))
    assert answer == chat_body("Conclusion: option 1")


TOO_LONG_BODY = {"error": {"message": "This model's maximum context length is 8 tokens."}}


@pytest.mark.parametrize(
    ("fault", "reason", "part"),
    [
        (status(400), MissingReason.HTTP_STATUS, "400"),
        (respond(TOO_LONG_BODY, 400), MissingReason.TOO_LONG, "maximum context"),
        (respond({"error": "Unauthorized"}, 401), MissingReason.HTTP_STATUS, "Unauthorized"),
        (status(404), MissingReason.HTTP_STATUS, "404"),
        (status(500), MissingReason.HTTP_STATUS, "500"),
        (status(503), MissingReason.HTTP_STATUS, "503"),
        (raw(b"<html>busy</html>", "text/html", 502), MissingReason.HTTP_STATUS, "HTML"),
        (reset, MissingReason.CONNECTION, ""),
        (reset_in_body, MissingReason.CONNECTION, ""),
        (raw(b'{"choices": [{"mess'), MissingReason.MALFORMED, "no JSON"),
        (raw(b'{"choices": NaN}'), MissingReason.MALFORMED, "no JSON"),
        (raw(b"[1, 2]"), MissingReason.MALFORMED, "no JSON object"),
        (raw(b"[" * 200_000), MissingReason.MALFORMED, "no JSON"),
        (raw(b""), MissingReason.MALFORMED, "empty"),
        (raw(b"\xff\xfe{}"), MissingReason.MALFORMED, "no JSON"),
        (raw(b"<!DOCTYPE html><p>hello"), MissingReason.MALFORMED, "HTML"),
        (raw(b"x" * 2_000_000), MissingReason.MALFORMED, "more than 1000000 bytes"),
        (flood, MissingReason.MALFORMED, "more than 1000000 bytes"),
        (raw(b"{}", **{"Content-Encoding": "gzip"}), MissingReason.MALFORMED, "compressed"),
    ],
)
def test_odd_answers_are_missing_with_their_reason(
    server: FakeServer, fault: Handler, reason: MissingReason, part: str
) -> None:
    server.script.append(fault)
    missing, after = post(settings(server.url), times=2)
    assert isinstance(missing, Missing)
    assert missing.reason is reason
    assert part in missing.detail
    assert after == chat_body("Conclusion: option 1"), "the client must be usable after a fault"


def test_what_a_server_says_stays_on_its_line(server: FakeServer) -> None:
    server.script.append(respond({"error": {"message": "no\nsuch\r\x1b[2J thing \ud83d" + 999 * "!"}}, 400))
    (missing,) = post(settings(server.url))
    assert isinstance(missing, Missing)
    assert missing.detail.startswith("400: no such [2J thing !!!")
    assert len(missing.detail) == 300


@pytest.mark.parametrize("fault", [hang, drip])
def test_a_silent_or_slow_server_costs_no_more_than_the_deadline(server: FakeServer, fault: Handler) -> None:
    server.fault_every_time = fault
    began = time.monotonic()
    [missing] = post(settings(server.url, timeout=0.5, retries=5))
    assert isinstance(missing, Missing)
    assert missing.reason is MissingReason.TIMEOUT
    assert time.monotonic() - began < 2.0


def test_retries_share_the_deadline(server: FakeServer) -> None:
    server.fault_every_time = status(503)
    began = time.monotonic()
    [missing] = post(settings(server.url, timeout=1.0, retries=1000))
    assert isinstance(missing, Missing)
    assert missing.reason is MissingReason.HTTP_STATUS
    assert "attempts" in missing.detail
    assert 2 <= len(server.requests) < 20
    assert time.monotonic() - began < 2.0


@pytest.mark.parametrize("fault", [status(429), status(503), reset, raw(b"{")])
def test_a_passing_fault_is_retried(server: FakeServer, fault: Handler) -> None:
    server.script.append(fault)
    [answer] = post(settings(server.url, retries=2))
    assert answer == chat_body("Conclusion: option 1")
    assert len(server.requests) == 2


@pytest.mark.parametrize("fault", [status(400), status(401), status(404), redirect("/v1/models")])
def test_a_lasting_fault_is_not_retried(server: FakeServer, fault: Handler) -> None:
    server.script.append(fault)
    [missing] = post(settings(server.url, retries=3))
    assert isinstance(missing, Missing)
    assert len(server.requests) == 1


def test_retry_after_is_waited_for(server: FakeServer) -> None:
    server.script.append(status(429, {"Retry-After": "1"}))
    began = time.monotonic()
    [answer] = post(settings(server.url, retries=1))
    assert isinstance(answer, dict)
    assert time.monotonic() - began >= 1.0


def test_retry_after_beyond_the_deadline_ends_at_once(server: FakeServer) -> None:
    server.script.append(status(429, {"Retry-After": "3600"}))
    began = time.monotonic()
    [missing] = post(settings(server.url, retries=3))
    assert isinstance(missing, Missing)
    assert missing.reason is MissingReason.HTTP_STATUS
    assert time.monotonic() - began < 1.0


def test_retry_after_forms() -> None:
    assert parse_retry_after("2.5") == 2.5
    later = parse_retry_after(format_datetime(datetime.now(UTC) + timedelta(seconds=60)))
    assert later is not None
    assert 55 < later <= 60
    assert parse_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    for nonsense in (None, "", "soon", "inf", "nan", "Wed, 21 Oct 2015 07:28:00 +9999999999999"):
        assert parse_retry_after(nonsense) is None


def test_redirects_are_refused_and_the_key_stays(server: FakeServer) -> None:
    with FakeServer() as other:
        server.key = KEY
        server.script.append(redirect(other.url + "/chat/completions"))
        [missing] = post(settings(server.url), {"JUDGE_API_KEY": KEY})
        assert isinstance(missing, Missing)
        assert "redirect" in missing.detail
        assert other.requests == []


def test_failover_inside_the_deadline(server: FakeServer) -> None:
    with FakeServer() as other:
        server.fault_every_time = hang
        other.answer = lambda _body: "from the other"
        began = time.monotonic()
        answers = post(settings(server.url, other.url, timeout=4.0, retries=2), times=3)
        assert answers == [chat_body("from the other")] * 3
        assert time.monotonic() - began < 4.0, "the silent server rests after its failure"


def test_a_dead_server_does_not_stop_the_service(server: FakeServer) -> None:
    dead = f"http://127.0.0.1:{unused_port()}/v1"
    answers = post(settings(dead, server.url, retries=1), times=4)
    assert answers == [chat_body("Conclusion: option 1")] * 4


def test_calls_are_spread_and_bounded() -> None:
    with FakeServer() as one, FakeServer() as two:

        async def slow(_request: Any) -> Any:
            await asyncio.sleep(0.05)
            return await respond(chat_body("ok"))(_request)

        one.fault_every_time = two.fault_every_time = slow

        async def run() -> None:
            client = ServiceClient(settings(one.url, two.url, concurrency=6), {})
            await client.open()
            answers = await asyncio.gather(*[client.post("/chat/completions", {}) for _ in range(30)])
            await client.close()
            assert answers == [chat_body("ok")] * 30
            assert client.calls == 30

        asyncio.run(run())
        assert one.most_in_flight == two.most_in_flight == 3
        assert len(one.requests) == len(two.requests) == 15


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_check_finds_the_only_model(server: FakeServer) -> None:
    assert check(settings(server.url)) == ServerInfo("fake", 2048, None, has_tokenize=True)
    assert check(settings(server.url.removesuffix("/v1"))).model == "fake", "a URL without a path gets /v1"


def test_check_without_tokenize_or_length() -> None:
    with FakeServer(tokenize=False, max_model_len=None) as server:
        assert check(settings(server.url)) == ServerInfo("fake", None, None, has_tokenize=False)


@pytest.mark.parametrize("handler", [status(404), status(401), status(501), respond({"hello": 1})])
def test_a_server_that_refuses_tokenize_is_used_without(server: FakeServer, handler: Handler) -> None:
    server.tokens_handler = handler
    assert not check(settings(server.url)).has_tokenize


@pytest.mark.parametrize("handler", [status(503), status(500), hang, reset])
def test_a_passing_fault_of_tokenize_is_no_lack_of_it(server: FakeServer, handler: Handler) -> None:
    """Else a busy moment at the start would change how all verdicts of the run are read."""
    server.tokens_handler = handler
    with pytest.raises(ServiceError, match=r"/tokenize.*start again"):
        check(settings(server.url, timeout=0.5))


@pytest.mark.parametrize(
    ("models", "wanted", "parts"),
    [
        (("a", "b"), None, ["2 models", "a, b", "--judge-model"]),
        (("a", "b"), "c", ["no model 'c'", "a, b", "--judge-model"]),
        ((), None, ["0 models"]),
    ],
)
def test_check_explains_a_wrong_model(models: tuple[str, ...], wanted: str | None, parts: list[str]) -> None:
    with FakeServer(models=models) as server, pytest.raises(ServiceError) as error:
        check(settings(server.url, model=wanted))
    assert all(part in str(error.value) for part in parts)


@pytest.mark.parametrize(
    ("handler", "part"),
    [
        (respond({"error": "Unauthorized"}, 401), "JUDGE_API_KEY"),
        (status(404), "usually ends in /v1"),
        (raw(b"<html>nginx</html>", "text/html"), "no OpenAI-compatible server"),
        (respond({"hello": 1}), "no OpenAI-compatible server"),
        (hang, "does not answer"),
        (status(500), "cannot be used"),
    ],
)
def test_check_explains_what_is_wrong(server: FakeServer, handler: Handler, part: str) -> None:
    server.models_handler = handler
    with pytest.raises(ServiceError, match=part):
        check(settings(server.url, timeout=0.5))


def test_check_explains_a_refused_connection() -> None:
    with pytest.raises(ServiceError, match=r"cannot connect to .*start the server or correct --judge-url"):
        check(settings(f"http://127.0.0.1:{unused_port()}/v1"))


def test_check_refuses_servers_of_different_models() -> None:
    with (
        FakeServer(models=("a",)) as one,
        FakeServer(models=("b",)) as two,
        pytest.raises(ServiceError, match="different models"),
    ):
        check(settings(one.url, two.url))


def test_the_key_is_sent_and_never_shown(server: FakeServer) -> None:
    server.key = KEY
    config = settings(server.url, key_variables=("REWRITER_API_KEY", "JUDGE_API_KEY"))
    server.script.append(respond({"error": {"message": f"key {KEY} is over its limit"}}, 400))
    missing, answer = post(config, {"JUDGE_API_KEY": KEY}, times=2)
    assert isinstance(missing, Missing)
    assert KEY not in missing.detail
    assert "over its limit" in missing.detail
    assert isinstance(answer, dict)
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    client = ServiceClient(config, {"JUDGE_API_KEY": KEY})
    assert KEY not in repr(client) + repr(client.settings) + repr(vars(client)) + str(Secret(KEY))


@pytest.mark.parametrize(
    "handler",
    [respond({"error": 285 * "x" + KEY}, 400), raw((72 * "x" + KEY).encode()), raw((192 * " " + KEY).encode())],
)
def test_half_a_key_is_not_shown_where_a_message_is_cut(server: FakeServer, handler: Handler) -> None:
    server.key = KEY
    server.script.append(handler)
    (missing,) = post(settings(server.url), {"JUDGE_API_KEY": KEY})
    assert isinstance(missing, Missing)
    assert KEY[:4] not in missing.detail
    assert "***" in missing.detail


def test_a_wrong_key_is_not_repeated_in_the_error(server: FakeServer) -> None:
    server.models_handler = respond({"error": {"message": f"Incorrect key: {KEY}"}}, 401)
    with pytest.raises(ServiceError) as error:
        check(settings(server.url), {"JUDGE_API_KEY": KEY})
    assert KEY not in str(error.value)


@pytest.mark.parametrize("host", ["judge.example.org", "10.0.0.5", "127.0.0.1.example.org", "[2001:db8::1]"])
def test_a_key_does_not_travel_over_plain_http(host: str) -> None:
    config = settings(f"http://{host}:8000/v1")
    ServiceClient(config, {})  # without a key nothing is at stake
    ServiceClient(settings(f"https://{host}/v1"), {"JUDGE_API_KEY": KEY})
    ServiceClient(settings(f"http://{host}:8000/v1", allow_insecure=True), {"JUDGE_API_KEY": KEY})
    with pytest.raises(ConfigError, match="--allow-insecure-judge") as error:
        ServiceClient(config, {"JUDGE_API_KEY": KEY})
    assert KEY not in str(error.value)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "[::1]"])
def test_this_machine_is_no_other_host(host: str) -> None:
    ServiceClient(settings(f"http://{host}:8000/v1"), {"JUDGE_API_KEY": KEY})


UNUSABLE_URLS = [
    *("", "127.0.0.1:8000", "ftp://a/v1", "http://", "http://[::1:8000/v1", "http://a:99999/v1", "http://a:x/v1"),
    *("http://u:pass-word@a/v1", "u:pass-word@a:8000/v1", "http://a/v1?k=pass-word", "http://a/v1#pass-word"),
    *("http://a/v1?next=http://pass-word", "http://pass-word@[::1:8000/v1"),
]


@pytest.mark.parametrize("url", UNUSABLE_URLS)
def test_unusable_urls(url: str) -> None:
    with pytest.raises(ConfigError, match="--judge-url") as error:
        ServiceClient(settings(url), {})
    assert "pass-word" not in str(error.value)


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "caf\u00e9", "   "])
def test_unusable_keys(key: str) -> None:
    with pytest.raises(ConfigError, match="JUDGE_API_KEY") as error:
        ServiceClient(settings("http://127.0.0.1:1/v1"), {"JUDGE_API_KEY": key})
    assert key not in str(error.value)


def test_proxy_variables_count_only_when_asked(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = f"http://127.0.0.1:{unused_port()}"
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", dead)
    monkeypatch.setenv("HTTP_PROXY", dead)
    assert isinstance(post(settings(server.url))[0], dict)
    [missing] = post(settings(server.url, trust_env_proxy=True))
    assert isinstance(missing, Missing)
    assert missing.reason is MissingReason.CONNECTION
