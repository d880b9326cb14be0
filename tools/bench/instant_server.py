"""A judge server that answers at once, in a process of its own: what is left of a call's time is the client's.

    python tools/bench/instant_server.py         # prints its base URL, and ends with its parent

It reads the length of a request and nothing else of it, and writes the same answer to every chat call. Only /tokenize,
which is asked at the start, is answered with thought: words with their leading space are tokens.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from typing import Any

TOKEN = re.compile(r" ?[A-Za-z0-9]+|[\s\S]")
MODEL = "instant"
CONTEXT = 16_384


class Vocabulary:
    """Ids of tokens, in the order of their first use."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def encode(self, body: dict[str, Any]) -> list[int]:
        """Of a plain prompt, or of chat turns."""
        text = body.get("prompt") or "".join(f"\n{turn['role']}:{turn['content']}" for turn in body["messages"])
        return [self._ids.setdefault(token, len(self._ids)) for token in TOKEN.findall(text)]


class Connection(asyncio.Protocol):
    """One connection that is kept alive; requests come one after the other."""

    def __init__(self, vocabulary: Vocabulary, chat: list[bytes]) -> None:
        self._vocabulary = vocabulary
        self._chat = chat  # the answer, made of a client's first request: it names the tokens that this asks about
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where to write."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer each whole request."""
        self._buffer += data
        while True:
            head, end, rest = self._buffer.partition(b"\r\n\r\n")
            if not end:
                return
            at = head.lower().find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(rest) < length:
                return
            self._buffer = rest[length:]
            self._transport.write(self._answer(head, rest[:length]))  # type: ignore[attr-defined]

    def _answer(self, head: bytes, body: bytes) -> bytes:
        if head.startswith(b"POST /v1/chat"):
            if not self._chat:
                self._chat.append(_response(_labels(json.loads(body))))
            return self._chat[0]
        if head.startswith(b"POST /tokenize"):
            self._chat.clear()  # a new client, which may ask about other tokens
            return _response({"tokens": self._vocabulary.encode(json.loads(body))})
        return _response({"data": [{"id": MODEL, "max_model_len": CONTEXT}]})


def _labels(body: dict[str, Any]) -> dict[str, Any]:
    """A chat answer of one token with the log-probabilities that were asked for, evenly spread."""
    names = [f"token_id:{token}" for token in body.get("logprob_token_ids", [0])]
    entries = [{"token": name, "logprob": -0.7, "bytes": None} for name in names]
    content = [{**entries[0], "top_logprobs": entries}]
    choice = {"index": 0, "message": {"content": "A"}, "finish_reason": "length", "logprobs": {"content": content}}
    return {"id": "chatcmpl-0", "object": "chat.completion", "model": MODEL, "choices": [choice]}


def _response(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data)


async def serve() -> None:
    """Serve on a free port of this machine until standard input ends."""
    loop = asyncio.get_running_loop()
    vocabulary, chat = Vocabulary(), list[bytes]()
    server = await loop.create_server(lambda: Connection(vocabulary, chat), "127.0.0.1", 0, backlog=4096)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


if __name__ == "__main__":
    asyncio.run(serve())
