"""A checked model behind a `ServiceClient`: token counts, prompts that fit, label tokens, chat and scoring calls."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_sip.errors import ServiceError
from megatron_sip.services.client import ServerInfo, ServiceClient
from megatron_sip.services.prompts import Prompt
from megatron_sip.services.quoting import Quoter, special_strings_of
from megatron_sip.types import Missing, MissingReason

PREFIX_STEP = 64
SMALLEST_PREFIX = 16
BOUNDARY_SLACK = 4
COUNTS_KEPT = 50_000
TOP_LOGPROBS = 20


class ModelServer:
    """One model of one service, after `start`.

    `trims` counts prompts that lost prefix tokens. `max_context` (tokens) overrides what the server reports. With
    `chats` its model must have a chat template; a reward model that reads plain text needs none.
    """

    def __init__(self, client: ServiceClient, max_context: int | None = None, chats: bool = True) -> None:
        self.client = client
        self.quoter = Quoter()
        self.trims = 0
        self._max_context = max_context
        self._chats = chats
        self._info: ServerInfo | None = None
        self._counts: OrderedDict[bytes, asyncio.Future[int | Missing]] = OrderedDict()  # by digest: texts are long
        self._template_tokens = 64
        self._bos: list[int] = []

    @property
    def info(self) -> ServerInfo:
        """What the server serves; RuntimeError before `start`."""
        if self._info is None:
            raise RuntimeError("ModelServer.start was not awaited")
        return self._info

    @property
    def context(self) -> int | None:
        """Longest prompt plus answer in tokens, or None where neither the server nor the user says."""
        reported = self.info.max_model_len
        if self._max_context is not None and reported is not None:
            return min(self._max_context, reported)
        return self._max_context or reported

    @property
    def prompting(self) -> str:
        """What shapes an answer besides texts and model name: context, quoting, /tokenize, the model's folder.

        Without /tokenize labels are asked for and prompts are cut in another way. The folder is told because other
        weights may be served under the same name; a server that tells none adds nothing.
        """
        tokenize = "yes" if self.info.has_tokenize else "no"
        of_root = "" if self.info.root is None else f" root {self.info.root}"
        return f"context {self.context} quoting {self.quoter.code} tokenize {tokenize}{of_root}"

    async def start(self) -> None:
        """Check the service and learn its tokenizer's habits. Raises ServiceError."""
        await self.client.open()
        self._info = await self.client.check()
        self.quoter = Quoter(special_strings_of(self._info.root))
        if self._info.has_tokenize:
            bare, full = await self._tokens_or_raise("a", False), await self._tokens_or_raise("a", True)
            self._bos = full[: len(full) - len(bare)] if full[len(full) - len(bare) :] == bare else []
            if self._chats:
                await self._learn_template()

    async def _learn_template(self) -> None:
        turn = await self.tokenize_chat([{"role": "user", "content": "a"}])
        if isinstance(turn, Missing):
            raise ServiceError(
                f"{self.client} cannot render a chat turn ({turn.reason}: {turn.detail}); start again if that passes, "
                "else serve an instruct model"
            )
        self._template_tokens = len(turn)

    async def _tokens_or_raise(self, text: str, special: bool) -> list[int]:
        found = await self.tokenize(text, special)
        if isinstance(found, Missing):
            raise ServiceError(f"{self.client}: /tokenize failed ({found.reason}: {found.detail})")
        return found[0]

    @property
    def bos(self) -> list[int]:
        """Ids that the tokenizer puts before a text (often one, often none)."""
        return list(self._bos)

    async def tokenize(self, text: str, special: bool = False) -> tuple[list[int], list[str]] | Missing:
        """Token ids and token strings of a plain text."""
        body = {
            "model": self.info.model,
            "prompt": text,
            "add_special_tokens": special,
            "return_token_strs": True,
        }
        answer = await self.client.post("/tokenize", body, at_root=True)
        if isinstance(answer, Missing):
            return answer
        tokens, strings = answer.get("tokens"), answer.get("token_strs")
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            return Missing(MissingReason.MALFORMED, "/tokenize gave no token ids")
        usable = isinstance(strings, list) and len(strings) == len(tokens)
        return tokens, [str(s) for s in strings] if usable and strings is not None else []

    async def tokenize_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int] | Missing:
        """Token ids of rendered chat messages; a last assistant message is left open for the model to go on."""
        answer = await self.client.post(
            "/tokenize",
            {"model": self.info.model, "messages": list(messages), **open_turn(messages)},
            at_root=True,
        )
        if isinstance(answer, Missing):
            return answer
        tokens = answer.get("tokens")
        if not isinstance(tokens, list):
            return Missing(MissingReason.MALFORMED, "/tokenize gave no token ids")
        return tokens

    async def count(self, text: str) -> int | Missing:
        """Tokens of `text`, each text asked once; one token for two bytes where the server has no /tokenize.

        Missing where it has and does not answer: a guess would cut a prompt that fits, or send one that does not.
        """
        if not self.info.has_tokenize:
            return math.ceil(len(text.encode()) / 2)
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        known = self._counts.get(digest)
        if known is None or known.cancelled():
            known = asyncio.ensure_future(self._ask_count(text))
            self._counts[digest] = known
            if len(self._counts) > COUNTS_KEPT:
                self._counts.popitem(last=False)
        counted = await asyncio.shield(known)
        if isinstance(counted, Missing):
            self._counts.pop(digest, None)
        return counted

    async def _ask_count(self, text: str) -> int | Missing:
        found = await self.tokenize(text)
        return Missing(found.reason, f"/tokenize: {found.detail}") if isinstance(found, Missing) else len(found[0])

    async def _count_all(self, texts: Iterable[str]) -> list[int] | Missing:
        """Tokens of each text, or why one is not known."""
        counts: list[int] = []
        for text in texts:
            counted = await self.count(text)
            if isinstance(counted, Missing):
                return counted
            counts.append(counted)
        return counts

    async def fit(self, prompt: Prompt, answer_tokens: int) -> list[dict[str, str]] | Missing:
        """Chat messages that leave room for the answer; the prefix loses tokens from the left if it must.

        The prefix is cut to a multiple of 64 tokens, so that the prompts of one pool go on sharing their beginning.
        """
        parts = (*prompt.parts(), prompt.prefill)
        prefix = await self.fit_prefix(prompt.prefix, parts, answer_tokens + self._template_tokens)
        return prefix if isinstance(prefix, Missing) else prompt.messages(prefix)

    async def fit_prefix(self, prefix: str, parts: Sequence[str], reserved: int) -> str | Missing:
        """`prefix`, or its end where `parts` (all pieces of the prompt, the prefix in one of them) are too long.

        `reserved` are tokens to leave for what is in no part: turns and answer. Missing(TOO_LONG) where too little
        would be left, or the reason for which /tokenize did not answer.
        """
        if self.context is None:
            return prefix
        room = self.context - reserved
        # A token is at least one byte, so a short prompt needs no question to the server.
        if sum(len(part.encode()) for part in parts) <= room:
            return prefix
        counts = await self._count_all(part for part in parts if part)
        if isinstance(counts, Missing):
            return counts
        excess = sum(counts) + BOUNDARY_SLACK * len(counts) - room
        return prefix if excess <= 0 else await self._without(prefix, excess)

    async def _without(self, prefix: str, excess: int) -> str | Missing:
        """`prefix` less `excess` tokens or a few more at its beginning."""
        count = await self.count(prefix) if prefix else 0
        if isinstance(count, Missing):
            return count
        keep = count - excess
        if keep < SMALLEST_PREFIX:
            return Missing(
                MissingReason.TOO_LONG, f"the prompt does not fit {self.context} tokens even without its prefix"
            )
        shorter = await self._shorten(prefix, count, keep - keep % PREFIX_STEP or keep)
        self.trims += isinstance(shorter, str)
        return shorter

    @property
    def template_tokens(self) -> int:
        """Tokens of one rendered turn of the shortest text."""
        return self._template_tokens

    async def _shorten(self, text: str, count: int, tokens: int) -> str | Missing:
        """The end of `text`, which has `count` tokens, with at most `tokens`, beginning at a word where one is near."""
        share, shorter = 1.0, text
        while count > tokens:
            share *= 0.98 * tokens / count
            kept = text[len(text) - int(len(text) * share) :]
            head, space, rest = kept.partition(" ")
            shorter = rest if space and len(head) < 40 else kept
            counted = await self.count(shorter)
            if isinstance(counted, Missing):
                return counted
            count = counted
        return shorter

    async def chat(self, messages: list[dict[str, str]], **fields: Any) -> dict[str, Any] | Missing:
        """One chat completion; `fields` are the request's further members."""
        body = {"model": self.info.model, "messages": messages, **fields}
        if messages[-1]["role"] == "assistant":
            body |= open_turn(messages)
        return await self.client.post("/chat/completions", body)

    async def complete(self, token_ids: list[int], **fields: Any) -> dict[str, Any] | Missing:
        """One completion of a prompt of tokens."""
        return await self.client.post("/completions", {"model": self.info.model, "prompt": token_ids, **fields})

    async def pooled(self, path: str, fields: Mapping[str, Any]) -> dict[str, Any] | Missing:
        """One answer of a pooling model: `path` stands beside /v1."""
        return await self.client.post(path, {"model": self.info.model, **fields}, at_root=True)

    async def label_ids(self, prefill: str, labels: Sequence[str]) -> dict[str, list[int]]:
        """Token ids that spell each label right after `prefill`, with and without a leading space.

        Asked of /tokenize in that very position. ServiceError where a label is no single token of its own.
        """
        before = await self._open_turn_ids(prefill)
        found: dict[str, list[int]] = {label: [] for label in labels}
        for label in labels:
            for spelling in (" " + label, label):
                after = await self._open_turn_ids(prefill + spelling)
                if after[: len(before)] == before and len(after) == len(before) + 1:
                    found[label].append(after[-1])
        ids = [token for spellings in found.values() for token in spellings]
        if not all(found.values()) or len(set(ids)) != len(ids):
            raise ServiceError(
                f"{self.client}: the labels {', '.join(labels)} are no single tokens of {self.info.model}; "
                "use --judge-reading generate"
            )
        return found

    async def _open_turn_ids(self, text: str) -> list[int]:
        """Token ids of a short chat whose last turn, the assistant's, begins with `text`. ServiceError without them."""
        found = await self.tokenize_chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": text}])
        if isinstance(found, Missing):
            raise ServiceError(
                f"{self.client} does not tokenize an open assistant turn ({found.reason}: {found.detail}); start again "
                "if that passes, else use another reading"
            )
        return found


def open_turn(messages: Sequence[Mapping[str, str]]) -> dict[str, bool]:
    """Request fields that let the model go on with a last assistant message, or begin its own."""
    prefilled = messages[-1]["role"] == "assistant"
    return {"add_generation_prompt": not prefilled, "continue_final_message": prefilled}
