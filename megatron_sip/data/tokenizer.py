"""Tokens and text: documents and rewrites into tokens, candidates into the text that judges read.

Text is data: whatever a document contains, no special token comes out of `encode`; only our own code inserts
end-of-document (EOD).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

from megatron_sip.data.pieces import decoder_kind, token_bytes
from megatron_sip.data.utf8 import split_tail, strip_continuation
from megatron_sip.errors import DataError
from megatron_sip.types import Missing, MissingReason, TokenArray

Tokens: TypeAlias = Sequence[int] | TokenArray

_PROBE = "A plain line,  two spaces; caf\u00e9 \u4f60\u597d \U0001f600!\n"
_SENTINEL = "\n"


class Tokenizer:
    """A Hugging Face fast tokenizer folder (byte-level BPE, or sentencepiece style with byte fallback).

    Raises:
        DataError: the folder is missing or unreadable, has no fast tokenizer, no end-of-sequence token, or a
            decoder whose token bytes are not known.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._hf = _load(path)
        self._backend = self._hf.backend_tokenizer
        # Never match a special token inside text (the meaning of split_special_tokens=True).
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        eod = self._hf.eos_token_id
        if eod is None:
            raise DataError(
                f"--tokenizer-model {path} names no end-of-sequence token, which ends documents; "
                'set "eos_token" in its tokenizer_config.json'
            )
        self.eod = int(eod)
        self._kind = decoder_kind(self._backend.to_str(), path)
        self.vocab_size = max(len(self._hf), len(self._pieces))
        self._check()

    @cached_property
    def _pieces(self) -> list[bytes]:
        added = {index: token.content for index, token in self._hf.added_tokens_decoder.items()}
        return token_bytes(self._backend.get_vocab(with_added_tokens=False), added, self._kind)

    def _check(self) -> None:
        """Our reading of the token bytes must agree with the tokenizer's own, and EOD must not come out of text."""
        tokens = self.encode(_PROBE)
        own = self._hf.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if self.decode_bytes(tokens).decode("utf-8", "replace") != own:
            raise DataError(
                f"--tokenizer-model {self.path}: the bytes of its tokens do not give its own decoded text; "
                "use a byte-level BPE or a Llama-style sentencepiece tokenizer"
            )
        if self.eod in self.encode(f"a{self._hf.eos_token} b"):
            raise DataError(
                f"--tokenizer-model {self.path}: the text {self._hf.eos_token!r} in a document becomes the "
                "end-of-document token; name an eos_token in tokenizer_config.json that is no piece of ordinary text"
            )

    def fingerprint(self) -> str:
        """sha256 of the vocabulary: corpora record it, so that another tokenizer's corpus is refused."""
        pairs = sorted(self._backend.get_vocab(with_added_tokens=True).items(), key=lambda pair: pair[1])
        return hashlib.sha256(json.dumps([pairs, self.eod]).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Tokens of `text`; no special token, no EOD, no beginning-of-sequence."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [list(encoding.ids) for encoding in encodings]

    def encode_continuation(self, text: str) -> list[int]:
        """Tokens of `text` as it stands in the middle of a document.

        Sentencepiece-style tokenizers put a space before whatever begins a text; encoding behind a line break
        whose tokens are then taken off keeps that space out.
        """
        anchor = self.encode(_SENTINEL)
        behind = self.encode(_SENTINEL + text)
        if self._kind == "space-mark" and behind[: len(anchor)] == anchor:
            return behind[len(anchor) :]
        return self.encode(text)

    def _bytes(self, tokens: Tokens) -> bytes:
        return b"".join(map(self._piece, tokens))

    def _piece(self, token: int) -> bytes:
        """Bytes of one token: none for an id without a token, which a model with a larger vocabulary may write."""
        pieces = self._pieces
        return pieces[int(token)] if token < len(pieces) else b""

    def _last_bytes(self, tokens: Tokens) -> bytes:
        """Enough bytes from the end of `tokens` to see whether a character is incomplete there."""
        data = b""
        index = len(tokens)
        while index > 0 and len(data) < 4:
            index -= 1
            data = self._piece(tokens[index]) + data
        return data

    def decode_bytes(self, tokens: Tokens) -> bytes:
        """Bytes of a text that begins with `tokens` (special tokens as their own text)."""
        data = self._bytes(tokens)
        if self._kind == "space-mark" and self._adds_space and data.startswith(b" "):
            return data[1:]
        return data

    @cached_property
    def _adds_space(self) -> bool:
        """Whether the tokenizer puts a space before a text, which its decoder takes off again."""
        return self._bytes(self.encode("a")).startswith(b" ")

    def decode(self, tokens: Tokens) -> str:
        """Text of `tokens`; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", "replace")

    def prefix_text(self, prefix_tokens: Tokens) -> str:
        """Text of a prefix: parts of characters at both ends left out (the last belongs to the candidate)."""
        return split_tail(strip_continuation(self.decode_bytes(prefix_tokens)))[0]

    def candidate_text(self, prefix_tokens: Tokens, candidate_tokens: Tokens) -> str:
        """decode(prefix + candidate) less decode(prefix), on bytes (method, "Tokens and text").

        An incomplete character at the cut belongs to the candidate, one at the end is dropped, so that
        `prefix_text(p) + candidate_text(p, c)` is the text of both.
        """
        pending = split_tail(self._last_bytes(prefix_tokens))[1]
        return split_tail(pending + self._bytes(candidate_tokens))[0]

    def is_char_boundary(self, tokens: Tokens, position: int) -> bool:
        """Whether the boundary before `tokens[position]` lies between two characters."""
        if split_tail(self._last_bytes(tokens[max(0, position - 4) : position]))[1]:
            return False
        following = self._bytes(tokens[position : position + 1])
        return not following or following[0] & 0xC0 != 0x80

    def rewrite_tokens(
        self, original_tokens: Tokens, original_text: str, rewrite_text: str, max_tokens: int
    ) -> tuple[int, ...] | Missing:
        """Tokens of a rewrite of `original_text` (method, "Tokens and text").

        The same text (stripped) takes the original's own tokens. Another is encoded with the original's
        leading white space and cut to `max_tokens`; a shorter one stays shorter. An empty one, or one under
        a quarter of `max_tokens`, is Missing.
        """
        rewrite = rewrite_text.strip()
        if not rewrite:
            return Missing(MissingReason.EMPTY, "the rewrite holds no text")
        if rewrite == original_text.strip():
            return tuple(int(token) for token in original_tokens)
        lead = original_text[: len(original_text) - len(original_text.lstrip())]
        tokens = self.encode_continuation(lead + rewrite)[:max_tokens]
        if 4 * len(tokens) < max_tokens:
            return Missing(MissingReason.TOO_SHORT, f"{len(tokens)} of {max_tokens} tokens")
        return tuple(tokens)


def _load(path: str):  # type: ignore[no-untyped-def]  # transformers' own class, imported late
    """The fast tokenizer of a folder (or of a cached hub name); nothing is fetched and no foreign code runs."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a folder it cannot read
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
        if not Path(path).exists():
            reason = "there is no such folder, and no such name in the hub's cache"
        raise DataError(
            f"--tokenizer-model {path} cannot be read as a Hugging Face tokenizer ({reason}); give a folder with "
            "tokenizer.json and tokenizer_config.json, such as tools/get_demo_data.py makes"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"--tokenizer-model {path} holds no fast tokenizer; save it with tokenizer.json")
    return tokenizer
