"""Where bytes or text stop being whole characters: the one rule behind prefix text, candidate text and cuts."""

from __future__ import annotations

import codecs
import re

_LONGEST_CHARACTER = 4
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def split_tail(data: bytes) -> tuple[str, bytes]:
    """Text of the whole characters of `data`, and the bytes of a character that begins at its end but is not complete.

    Bytes that are no UTF-8 at all (a sampled rollout can hold them) become U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(data, False)
    return text, decoder.getstate()[0]


def strip_continuation(data: bytes) -> bytes:
    """`data` without the last bytes of a character that began before it (at most three)."""
    start = 0
    while start < min(len(data), _LONGEST_CHARACTER - 1) and data[start] & 0xC0 == 0x80:
        start += 1
    return data[start:]


def has_half_character(text: str) -> bool:
    """Whether `text` holds a lone surrogate (JSON can write one): no UTF-8 spells it and no tokenizer takes it."""
    return not text.isascii() and _LONE_SURROGATE.search(text) is not None
