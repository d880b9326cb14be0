"""The rewriter: a better continuation of the same length, or Missing (paper section 4)."""

from __future__ import annotations

from megatron_sip.services.model_server import ModelServer
from megatron_sip.services.prompts import rewrite_prompt
from megatron_sip.services.quoting import end_marker
from megatron_sip.services.verdicts import answer_text
from megatron_sip.types import Missing, MissingReason


class Rewriter:
    """Asks a chat model to mend a continuation."""

    name = "rewriter"

    def __init__(self, server: ModelServer, temperature: float = 1.0, top_p: float = 1.0) -> None:
        self._server = server
        self._temperature = temperature
        self._top_p = top_p

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
        body = await self._server.chat(
            messages, max_tokens=max_tokens, temperature=self._temperature, top_p=self._top_p
        )
        if isinstance(body, Missing):
            return body
        text = answer_text(body)
        if isinstance(text, Missing):
            return text
        if end_marker(prompt.prefix_code) in text:
            return Missing(MissingReason.UNPARSABLE, "the rewrite repeats the prompt's markers")
        same = text.strip() == self._server.quoter.clean(original_text).strip()
        return original_text if same else text
