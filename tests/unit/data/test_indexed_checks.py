"""An .idx from anybody: whatever it claims is held against the .bin before a token is read."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sip.data.indexed import MAGIC, open_indexed
from megatron_sip.errors import DataError

LENGTHS, TOKENS = [3, 2, 4], 9
"""Of a sound corpus: three sequences of u16 tokens in two documents."""


def write(prefix: Path, **claims: Any) -> str:
    """A corpus of nine tokens whose index says what `claims` say, where they say otherwise."""
    lengths = claims.get("lengths", LENGTHS)
    offsets = claims.get("offsets", [0, 6, 10])
    bounds = claims.get("bounds", [0, 2, 3])
    head = struct.pack(
        "<9sQBQQ",
        MAGIC,
        claims.get("version", 1),
        claims.get("code", 8),
        claims.get("num_sequences", len(lengths)),
        claims.get("num_bounds", len(bounds)),
    )
    parts = (np.array(lengths, np.int32), np.array(offsets, np.int64), np.array(bounds, np.int64))
    body = b"".join(part.tobytes() for part in parts)
    Path(f"{prefix}.idx").write_bytes(head + body + claims.get("behind", b""))
    Path(f"{prefix}.bin").write_bytes(np.arange(claims.get("num_tokens", TOKENS), dtype=np.uint16).tobytes())
    return str(prefix)


def test_the_sound_one_is_read(tmp_path: Path) -> None:
    found = open_indexed(write(tmp_path / "c"))
    assert found.starts.tolist() == [0, 5]
    assert found.lengths.tolist() == [5, 4]
    assert found.tokens.tolist() == list(range(TOKENS))


@pytest.mark.parametrize(
    ("claims", "says"),
    [
        ({"lengths": [3, -2, 8]}, "negative lengths"),
        ({"lengths": [-(2**31), 2, 4]}, "negative lengths"),
        ({"lengths": [3, 2, 5]}, r"c\.bin is truncated"),
        ({"lengths": [3, 2, 2**31 - 1]}, r"a sequence of 2147483647 tokens, where the file holds 9"),
        ({"lengths": [2**31 - 1] * 3}, r"where the file holds 9"),
        ({"lengths": [3, 2, 3]}, "not of one corpus"),
        ({"offsets": [0, -6, 10]}, "offsets do not follow"),
        ({"offsets": [-2, 6, 10]}, "offsets do not follow"),
        ({"offsets": [0, 4, 10]}, "offsets do not follow"),  # sequences that overlap
        ({"offsets": [0, 6, 2**62]}, "offsets do not follow"),
        ({"offsets": [10, 6, 0]}, "offsets do not follow"),
        ({"bounds": [0, 3, 2, 3]}, "document bounds"),
        ({"bounds": [0, -1, 3]}, "document bounds"),
        ({"bounds": [-1, 2, 3]}, "document bounds"),
        ({"bounds": [1, 2, 3]}, "document bounds"),
        ({"bounds": [0, 2, 4]}, "document bounds"),
        ({"bounds": [0, 2]}, "document bounds"),
        ({"bounds": [0, 2**63 - 1, -2, 3]}, "document bounds"),  # whose differences wrap around to positive ones
        ({"bounds": []}, "document bounds"),
        ({"code": 0}, "type code 0"),
        ({"code": 6}, "type code 6"),  # floating point
        ({"code": 7}, "type code 7"),
        ({"code": 9}, "type code 9"),
        ({"code": 255}, "type code 255"),
        ({"code": 4}, r"offsets do not follow|c\.bin"),  # int32 where the tokens are u16
        ({"version": 0}, "version 0"),
        ({"version": 2**64 - 1}, "version 18446744073709551615"),
        ({"num_sequences": 4}, r"c\.idx is truncated"),
        ({"num_sequences": 2**64 - 1}, r"c\.idx is truncated"),
        ({"num_sequences": 2}, r"c\.idx is damaged: 94 bytes where its header says"),
        ({"num_bounds": 2**63}, r"c\.idx is truncated"),
        ({"num_bounds": 4}, r"c\.idx is truncated"),
        ({"num_bounds": 2}, r"c\.idx is damaged"),
        ({"behind": b"\0"}, r"c\.idx is damaged"),
        ({"num_tokens": 8}, r"c\.bin is truncated"),
        ({"num_tokens": 10}, "not of one corpus"),
        ({"num_tokens": 0}, r"c\.bin is truncated"),
    ],
)
def test_every_false_claim_is_refused(tmp_path: Path, claims: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        open_indexed(write(tmp_path / "c", **claims))
    assert "tools/preprocess_data.py" in str(caught.value)


def test_modes_of_multimodal_data_may_follow(tmp_path: Path) -> None:
    assert open_indexed(write(tmp_path / "c", behind=b"\0\0\0")).lengths.tolist() == [5, 4]


def test_half_a_token_is_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "c")
    with Path(f"{prefix}.bin").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(DataError, match="not of one corpus"):
        open_indexed(prefix)
