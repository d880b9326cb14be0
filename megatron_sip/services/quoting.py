"""Texts inside prompts are data: nothing in them may open a chat turn, close a marker or look like one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from megatron_sip.errors import ServiceError

# Control strings of chat tokenizers begin with "<" plus a non-space (<s>, </s>, <think>, <|im_end|>, <<SYS>>),
# or with "[" plus capitals ([INST], [/TOOL_CALLS]); our own end marker begins with "[end ". One space after the
# bracket breaks them all; "a < b" and "[1]" stay as they are.
_OPENERS = re.compile(r"<(?=[^\s=\d<])|<(?=<)|\[(?=/?[A-Z_]{2}|end )")
_CLOSERS = re.compile(r"(?<=[|\uff5c])>")

TEXTS_KEPT = 256
"""Clean texts that are kept: those of the pools whose questions are under way."""


class Quoter:
    """Breaks up control strings by the general rule and by an exact list of the judge tokenizer's special tokens."""

    def __init__(self, special_strings: Iterable[str] = ()) -> None:
        # The longest first, so that a token that holds another one is seen whole. White-space tokens cannot be
        # broken by a space and open nothing.
        exact = sorted({s for s in special_strings if len(s) > 1 and s.strip() == s}, key=lambda s: (-len(s), s))
        self._exact = re.compile("|".join(re.escape(s) for s in exact)) if exact else None
        # A pool of 17 shows its prefix in 272 prompts and each candidate in 32; cleaning took 40 % of a verdict's time.
        self._kept = lru_cache(maxsize=TEXTS_KEPT)(self._clean)
        self.code = hashlib.blake2s("\0".join(exact).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        """Tells quoters with different lists apart."""

    def clean(self, text: str) -> str:
        """`text` with a space inside every control string; the same text always gives the same result."""
        return self._kept(text)

    def _clean(self, text: str) -> str:
        # A lone surrogate is no text that could be sent.
        text = text.encode("utf-8", "replace").decode("utf-8").replace("\x00", " ")
        text = _CLOSERS.sub(" >", _OPENERS.sub(_with_space, text))
        # One replacement can leave another listed string behind, so repeat; each pass adds spaces, so it ends.
        while self._exact is not None and self._exact.search(text):
            text = self._exact.sub(_split_first, text)
        return text


def _with_space(match: re.Match[str]) -> str:
    return match.group() + " "


def _split_first(match: re.Match[str]) -> str:
    return match.group()[0] + " " + match.group()[1:]


def nonce(text: str) -> str:
    """A code for the markers around `text`, the same for the same text, so that prompts share their beginning."""
    return hashlib.blake2s(text.encode("utf-8", "surrogatepass"), digest_size=3).hexdigest()


def quoted(name: str, code: str, clean_text: str) -> str:
    """`clean_text` between a line with its name and the line that ends it."""
    return f"{name} [{code}]:{clean_text}\n{end_marker(code)}\n\n"


def end_marker(code: str) -> str:
    """The line that ends a text; no clean text can hold it."""
    return f"[end {code}]"


def special_strings_of(folder: str | None) -> list[str]:
    """The added tokens in `tokenizer.json` of a model folder; empty when the folder is not on this machine."""
    if folder is None:
        return []
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        return []
    try:
        entries = json.loads(file.read_text(encoding="utf-8")).get("added_tokens", [])
        return [str(entry["content"]) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ServiceError(f"{file} of the judge cannot be read ({error}); repair the model folder") from error
