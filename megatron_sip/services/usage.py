"""Tokens that a service has used, as its answers tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sip.types import Missing


@dataclass
class Usage:
    """Running totals of one service.

    `unmetered` counts answers of a model that do not tell their tokens: the totals leave them out. An answer that
    never came whole (a `Missing`, an attempt before a retry) may have cost its server tokens that nobody tells.
    """

    prompt_tokens: int = 0
    answer_tokens: int = 0
    unmetered: int = 0

    def add(self, answer: Mapping[str, Any] | Missing) -> None:
        """Count one answer. One that no model wrote (/tokenize) has no tokens to tell and is left alone."""
        if isinstance(answer, Missing) or not any(name in answer for name in ("usage", "choices", "data")):
            return
        usage = answer.get("usage")
        told = usage if isinstance(usage, dict) else {}
        # A server without answer tokens (scores, classes) leaves them out or writes null.
        prompt, written = told.get("prompt_tokens"), told.get("completion_tokens") or 0
        if type(prompt) is not int or type(written) is not int or prompt < 0 or written < 0:
            self.unmetered += 1
            return
        self.prompt_tokens += prompt
        self.answer_tokens += written
