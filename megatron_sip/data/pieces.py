"""The bytes of every token of a Hugging Face fast tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from megatron_sip.errors import DataError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "\u2581"


def byte_alphabet() -> dict[str, int]:
    """Character -> byte of the byte-level alphabet (GPT-2): printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + rank): byte for rank, byte in enumerate(others)})
    return table


def decoder_kind(backend_json: str, name: str) -> str:
    """`byte-level` or `space-mark` (Llama-2 and other sentencepiece models), from the tokenizer's own decoder.

    Raises:
        DataError: a decoder of another kind; the bytes of its tokens are not known.
    """
    decoder = json.loads(backend_json).get("decoder")
    types = {step["type"]: step for step in _steps(decoder)}
    if "ByteLevel" in types:
        return "byte-level"
    marks = any(
        step["type"] == "Replace" and _SPACE_MARK in json.dumps(step, ensure_ascii=False) for step in _steps(decoder)
    )
    if "Metaspace" in types or marks:
        return "space-mark"
    found = ", ".join(types) or "none"
    raise DataError(
        f"--tokenizer-model {name}: its decoder ({found}) is neither byte-level BPE nor sentencepiece style; "
        "give a tokenizer of one of these two kinds"
    )


def _steps(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The decoder itself, or the steps of a sequence of decoders."""
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
        return
    yield decoder


def token_bytes(vocabulary: dict[str, int], added: dict[int, str], kind: str) -> list[bytes]:
    """`[vocab_size]` bytes of each token; an id that no token has is empty. Added tokens stand for their own text."""
    size = 1 + max([*vocabulary.values(), *added])
    table = [b""] * size
    alphabet = byte_alphabet()
    for token, index in vocabulary.items():
        table[index] = _byte_level(token, alphabet) if kind == "byte-level" else _space_mark(token)
    for index, content in added.items():
        table[index] = content.encode("utf-8")
    return table


def _byte_level(token: str, alphabet: dict[str, int]) -> bytes:
    try:
        return bytes(alphabet[character] for character in token)
    except KeyError:
        # A token outside the alphabet was put into the vocabulary as plain text.
        return token.encode("utf-8")


def _space_mark(token: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    if match:
        return bytes([int(match.group(1), 16)])
    return token.replace(_SPACE_MARK, " ").encode("utf-8")
