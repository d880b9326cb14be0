"""The rewriter: a better continuation of the same length, or Missing (paper section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megatron_sip.services.journal_records import REWRITER, Key, Source, text_hash, token_hash
from megatron_sip.services.model_server import ModelServer
from megatron_sip.services.prompts import VERSIONS, rewrite_prompt
from megatron_sip.services.quoting import end_marker
from megatron_sip.services.verdicts import answer_text
from megatron_sip.types import Missing, MissingReason


class RewriteRequest(NamedTuple):
    """An original suffix, by the global index of its sample, its tokens and its text, and the text before it."""

    sample_index: int
    tokens: Sequence[int]
    prefix_text: str
    original_text: str


def rewrite_key(request: RewriteRequest, source: Source) -> Key:
    """What the journal calls this request to this rewriter."""
    context = text_hash(request.prefix_text, request.original_text)
    return Key(request.sample_index, context, source, token_hash(request.tokens))


class Rewriter:
    """Asks a chat model to mend a continuation."""

    name = REWRITER
    version = VERSIONS["rewrite"]

    def __init__(self, server: ModelServer, temperature: float = 1.0, top_p: float = 1.0) -> None:
        self._server = server
        self._temperature = temperature
        self._top_p = top_p

    @property
    def model(self) -> str:
        """Name of the model that is asked; RuntimeError before the server is started."""
        return self._server.info.model

    @property
    def prompting(self) -> str:
        """What of the server shapes an answer besides the prompt's texts."""
        return self._server.prompting

    def settings(self, max_tokens: int) -> str:
        """How a rewrite of at most `max_tokens` tokens is sampled."""
        return f"temperature {self._temperature} top_p {self._top_p} max_tokens {max_tokens}"

    async def rewrite(self, prefix_text: str, original_text: str, max_tokens: int) -> str | Missing:
        """The rewritten continuation; `max_tokens` are tokens of the rewriter.

        Missing when the answer was cut by length, is empty, or holds our own markers. A faithful copy of what the
        prompt showed (control strings broken up) is given back as the original itself.
        """
        if not original_text.strip():
            return Missing(MissingReason.EMPTY, "there is no text to rewrite")
        prompt = rewrite_prompt(self._server.quoter, prefix_text, original_text)
        messages = await self._server.fit(prompt, max_tokens)
        if isinstance(messages, Missing):
            return messages
        # Texts in the prompt end with this line; a model that ends its own so, and then begins anew, has finished.
        marker = end_marker(prompt.prefix_code)
        body = await self._server.chat(
            messages, max_tokens=max_tokens, temperature=self._temperature, top_p=self._top_p, stop=[marker]
        )
        if isinstance(body, Missing):
            return body
        text = answer_text(body)
        if isinstance(text, Missing):
            return text
        if marker in text:  # the server knows no stop strings
            return Missing(MissingReason.UNPARSABLE, "the rewrite repeats the prompt's markers")
        same = text.strip() == self._server.quoter.clean(original_text).strip()
        return original_text if same else text
