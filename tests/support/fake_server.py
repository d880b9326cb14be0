"""A small OpenAI-compatible server in a thread, with odd answers on schedule.

    with FakeServer() as server:
        server.script.append(status(503, {"Retry-After": "0"}))   # the next POST to /v1 answers so
        ... server.url ...

It speaks the parts of vLLM that the product uses: /v1/models, /tokenize, chat completions (with label
log-probabilities), completions (with prompt log-probabilities), /classify and /score. Its tokenizer knows words with
their leading space, single characters, and the control strings in `CONTROL`.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
import struct
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from aiohttp import web

CONTROL = ("<|user|>", "<|assistant|>", "<|end|>")
TOKEN = re.compile("|".join(re.escape(c) for c in CONTROL) + r"| ?[A-Za-z0-9]+|[\s\S]")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Answer = Callable[[dict[str, Any]], str]


class FakeServer:
    """One server on 127.0.0.1, on `port` or a free one; with `tls` it speaks https.

    `answer(body)` writes the text of a chat answer, `logits(body)` are those of a reward model. `script` holds
    handlers for the next POSTs (but those to /tokenize), first in first out; when it is empty (or `fault_every_time`
    is None) requests are answered properly. `peers` are the ends of all connections that POSTs came over, `probes`
    counts questions about its health.
    """

    def __init__(
        self,
        *,
        key: str | None = None,
        models: tuple[str, ...] = ("fake",),
        max_model_len: int | None = 2048,
        answer: Answer = lambda _body: "Conclusion: option 1",
        label_logprobs: tuple[float, ...] = (-0.5, -1.5, -2.5, -3.5, -4.5, -5.5),
        tokenize: bool = True,
        port: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.key = key
        self.models = models
        self.max_model_len = max_model_len
        self.answer = answer
        self.label_logprobs = label_logprobs
        self.logits: Callable[[dict[str, Any]], list[float]] = lambda _body: [0.0]
        self.script: deque[Handler] = deque()
        self.fault_every_time: Handler | None = None
        self.models_handler: Handler | None = None
        self.tokens_handler: Handler | None = None
        self.health_handler: Handler | None = None
        self.probes = 0
        self.peers: set[object] = set()
        self.port = port
        self._tls = tls
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self._tokenize = tokenize
        self._vocabulary: dict[str, int] = {text: number for number, text in enumerate(CONTROL)}
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)

    @property
    def url(self) -> str:
        """Base URL with /v1."""
        return f"http{'s' if self._tls else ''}://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> FakeServer:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Go away: connections are cut, and new ones refused. A second call does nothing."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self.leave)
            self._thread.join(10)
            assert not self._thread.is_alive()

    def leave(self) -> None:
        """Begin to go away; for handlers, in the server's own loop."""
        self._stop.set()

    async def _serve(self) -> None:
        app = web.Application(client_max_size=64_000_000)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._scripted(self._chat))
        app.router.add_post("/v1/completions", self._scripted(self._complete))
        app.router.add_post("/classify", self._scripted(self._classify))
        app.router.add_post("/score", self._scripted(self._score))
        if self._tokenize:
            app.router.add_post("/tokenize", self._tokens)
        self.add_routes(app)
        runner = web.AppRunner(app, shutdown_timeout=0.2, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port, ssl_context=self._tls)
        await site.start()
        self.port = runner.addresses[0][1]
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    def add_routes(self, app: web.Application) -> None:
        """More routes, of a server that can more."""

    def _scripted(self, proper: Handler) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            self.headers.append(dict(request.headers))
            self.requests.append((request.path, await request.json()))
            self.peers.add(request.get_extra_info("peername"))
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            try:
                if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
                    return web.json_response({"error": "Unauthorized"}, status=401)
                handler = self.script.popleft() if self.script else self.fault_every_time
                return await (handler or proper)(request)
            finally:
                self.in_flight -= 1

        return handle

    async def _health(self, request: web.Request) -> web.StreamResponse:
        self.probes += 1
        return await (self.health_handler or raw(b""))(request)

    async def _models(self, request: web.Request) -> web.StreamResponse:
        self.headers.append(dict(request.headers))
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        if self.models_handler is not None:
            return await self.models_handler(request)
        entries = [{"id": name, "object": "model", "max_model_len": self.max_model_len} for name in self.models]
        return web.json_response({"object": "list", "data": entries})

    def encode(self, text: str) -> tuple[list[int], list[str]]:
        """Ids and byte-level token strings (one character a byte; a space is shown as G with a dot)."""
        pieces = TOKEN.findall(text)
        ids = [self._vocabulary.setdefault(piece, len(self._vocabulary)) for piece in pieces]
        strings = ["".join("\u0120" if b == 32 else chr(b) for b in piece.encode()) for piece in pieces]
        return ids, strings

    def text_of(self, token: int) -> str:
        """The text of a token id."""
        return next(text for text, number in self._vocabulary.items() if number == token)

    def render(self, body: dict[str, Any]) -> str:
        """The chat template."""
        turns = [f"<|{turn['role']}|>{turn['content']}" for turn in body["messages"]]
        opened = "<|assistant|>" if body.get("add_generation_prompt", True) else ""
        last = "" if body.get("continue_final_message") else "<|end|>"
        return "<|end|>".join(turns) + last + opened

    async def _tokens(self, request: web.Request) -> web.StreamResponse:
        if self.tokens_handler is not None:
            return await self.tokens_handler(request)
        body = await request.json()
        ids, strings = self.encode(self.render(body) if "messages" in body else body["prompt"])
        return web.json_response({"count": len(ids), "tokens": ids, "token_strs": strings})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if body.get("logprobs"):
            return web.json_response(self._labels(body))
        return web.json_response(chat_body(self.answer(body)))

    def _labels(self, body: dict[str, Any]) -> dict[str, Any]:
        names = [f"token_id:{token}" for token in body.get("logprob_token_ids", [])]
        values = zip(names, self.label_logprobs, strict=False)
        entries = [{"token": name, "logprob": value, "bytes": None} for name, value in values]
        return labels_body(entries)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        rows: list[Any] = [{str(token): {"logprob": -0.5, "rank": 1}} for token in body["prompt"]]
        rows[0] = None
        return web.json_response({"choices": [{"text": "x", "finish_reason": "length", "prompt_logprobs": rows}]})

    async def _classify(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(classes_body(self.logits(await request.json())))

    async def _score(self, request: web.Request) -> web.StreamResponse:
        [logit] = self.logits(await request.json())
        return web.json_response({"object": "list", "data": [{"index": 0, "object": "score", "score": logit}]})


def classes_body(logits: list[Any]) -> dict[str, Any]:
    """An answer of /classify to one text."""
    return {"object": "list", "data": [{"index": 0, "label": "LABEL_0", "probs": logits, "num_classes": len(logits)}]}


def chat_body(content: object, finish: str = "stop") -> dict[str, Any]:
    """A chat answer."""
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish}]}


def labels_body(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """A chat answer of one token with its log-probabilities."""
    content = [{**entries[0], "top_logprobs": entries}] if entries else []
    choice = {"index": 0, "message": {"content": "x"}, "finish_reason": "length", "logprobs": {"content": content}}
    return {"choices": [choice]}


def respond(body: object, status: int = 200, headers: dict[str, str] | None = None) -> Handler:
    """Answer with a JSON body."""

    async def handle(_request: web.Request) -> web.StreamResponse:
        return web.json_response(body, status=status, headers=headers)

    return handle


def status(code: int, headers: dict[str, str] | None = None) -> Handler:
    """Answer with an error of this status."""
    return respond({"error": {"message": f"status {code}", "code": code}}, code, headers)


def raw(body: bytes, content_type: str = "application/json", code: int = 200, **headers: str) -> Handler:
    """Answer with these bytes."""

    async def handle(_request: web.Request) -> web.StreamResponse:
        return web.Response(body=body, status=code, content_type=content_type, headers=headers)

    return handle


async def reset(request: web.Request) -> web.StreamResponse:
    """Reset the connection without an answer."""
    _abort(request)
    return web.Response()


async def reset_in_body(request: web.Request) -> web.StreamResponse:
    """Begin a proper answer and reset the connection in the middle."""
    response = web.StreamResponse(headers={"Content-Length": "1000", "Content-Type": "application/json"})
    await response.prepare(request)
    await response.write(b'{"choices": [{"ind')
    _abort(request)
    return response


def _abort(request: web.Request) -> None:
    transport = request.transport
    assert transport is not None
    connection = transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


async def hang(_request: web.Request) -> web.StreamResponse:
    """Never answer."""
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


def die(server: FakeServer) -> Handler:
    """The server goes away instead of an answer, and takes the other calls with it."""

    async def handle(request: web.Request) -> web.StreamResponse:
        server.leave()
        return await hang(request)

    return handle


async def drip(request: web.Request) -> web.StreamResponse:
    """Send a proper answer, one byte every 20 ms."""
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    for byte in json.dumps(chat_body("Conclusion: option 1 " + "." * 2000)).encode():
        await response.write(bytes([byte]))
        await asyncio.sleep(0.02)
    return response


async def flood(request: web.Request) -> web.StreamResponse:
    """Send 50 MB of proper JSON in chunks, without saying how much it will be."""
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    with suppress(ConnectionResetError):  # nobody reads all of it
        await response.write(b'{"padding": "')
        for _ in range(50):
            await response.write(b"x" * 1_000_000)
        await response.write(b'"}')
    return response


def redirect(location: str) -> Handler:
    """Point somewhere else."""

    async def handle(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=307, headers={"Location": location})

    return handle
