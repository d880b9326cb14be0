"""How the journal spells verdicts and rewrites: one JSON object a line, with a checksum. Pure.

    {"crc":"5d41402a","v":1,"kind":"verdicts","sample":12,"count":2,"context":"...","source":["quality","smollm2",
     "quality-logit-1","logit"],"candidates":["...","..."],"answers":[[0,1,0,0.73],[1,0,0,{"missing":"timeout"}]]}

A line holds what one service said of one sample in one round; an answer is [first, second, vote, value] with indices
into `candidates`. JSON because a person can read and search it, and Python's numbers come back from it bit for bit; the
checksum, over all that follows it in the line, tells a record that was cut off or damaged from a whole one. The fields
up to `count` stand in this order, so that a reader finds its way without parsing the rest.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from megatron_sip.errors import CheckpointError
from megatron_sip.types import Missing, MissingReason, Pool, Question

VERSION = 1
REWRITER = "rewriter"
FROM_JOURNAL = "from the journal"
KINDS = ("verdicts", "rewrites", "void", "end")
_HEAD = re.compile(rb'\{"crc":"([0-9a-f]{8})",("v":(\d+),(?:"kind":"(\w+)","sample":(-?\d+),"count":(\d+))?.*)')
_DIGEST_BYTES = 12


class Source(NamedTuple):
    """Who answers: the service's name, its model, the version of its words, and its reading and sampling settings."""

    service: str
    model: str
    version: str
    settings: str


class Key(NamedTuple):
    """What was asked: two equal keys are the same question.

    `sample` is the global sample index and `context` a hash of the texts around the candidates. `first` and `second`
    are hashes of the candidates' tokens in the order shown; a rewrite has the original as `first`.
    """

    sample: int
    context: str
    source: Source
    first: str
    second: str | None = None
    vote: int = 0


Value: TypeAlias = float | str | Missing
"""A verdict in [0, 1], the text of a rewrite, or why there is none."""

Entry: TypeAlias = tuple[Key, Value]


@dataclass(frozen=True)
class Head:
    """The first fields of a whole line. `kind` is one of KINDS.

    `sample` is the sample spoken of; for `void` the first sample that is void; for `end`, the last line of a segment
    that was closed, its greatest sample. `count` counts answers; for `end`, the voids in the segment.
    """

    kind: str
    sample: int
    count: int


def token_hash(tokens: Sequence[int]) -> str:
    """A name for a token sequence, the same on every machine; 96 bits."""
    return _digest(np.asarray(tokens, dtype="<i8").tobytes())


def text_hash(*texts: str) -> str:
    """A name for texts in their order, the same on every machine; 96 bits."""
    parts = [text.encode("utf-8", "surrogatepass") for text in texts]
    return _digest(b"".join(len(part).to_bytes(8, "little") + part for part in parts))


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()


def verdict_keys(pool: Pool, questions: Sequence[Question], sources: Mapping[str, Source]) -> list[Key]:
    """The keys of questions on the distinct candidates of `pool`; `sources` by the judge's name."""
    context = text_hash(pool.prefix_text, pool.original_text)
    hashes = [token_hash(candidate.tokens) for candidate in pool.candidates]
    return [
        Key(
            pool.sample_index,
            context,
            sources[question.judge],
            hashes[question.first],
            None if question.second is None else hashes[question.second],
            question.vote,
        )
        for question in questions
    ]


def encode(entries: Iterable[Entry]) -> list[bytes]:
    """Lines with their newline, one for each sample, context and source.

    The reason of a Missing is kept and its detail is not: that may quote what a server said, keys included.

    Raises:
        ValueError: a verdict is no finite number.
    """
    groups: dict[tuple[int, str, Source], list[Entry]] = {}
    for key, value in entries:
        groups.setdefault((key.sample, key.context, key.source), []).append((key, value))
    return [_encode_group(*group, members) for group, members in groups.items()]


def _encode_group(sample: int, context: str, source: Source, members: Sequence[Entry]) -> bytes:
    numbers: dict[str, int] = {}
    answers = []
    for key, value in members:
        first = numbers.setdefault(key.first, len(numbers))
        second = None if key.second is None else numbers.setdefault(key.second, len(numbers))
        answers.append([first, second, key.vote, _encode_value(key, value)])
    kind = "rewrites" if source.service == REWRITER else "verdicts"
    more = {"context": context, "source": list(source), "candidates": list(numbers), "answers": answers}
    return _line(kind, sample, len(answers), more)


def _encode_value(key: Key, value: Value) -> Any:
    if isinstance(value, Missing):
        return {"missing": value.reason.value}
    if isinstance(value, str):
        return {"text": value}
    if not math.isfinite(value):
        raise ValueError(f"{value} of {key.source.service} for sample {key.sample} is no verdict")
    return float(value)


def encode_void(first_sample: int) -> bytes:
    """The line that makes all that was written before it of `first_sample` and later ones void."""
    return _line("void", first_sample, 0, {})


def encode_end(last_sample: int, voids: int) -> bytes:
    """The last line of a segment that was closed."""
    return _line("end", last_sample, voids, {})


def _line(kind: str, sample: int, count: int, more: Mapping[str, Any]) -> bytes:
    fields = {"v": VERSION, "kind": kind, "sample": sample, "count": count, **more}
    # ASCII only, so that a lone surrogate in a rewrite survives and no line ever breaks inside a text.
    rest = json.dumps(fields, ensure_ascii=True, allow_nan=False, separators=(",", ":"))[1:].encode()
    return b'{"crc":"%08x",' % zlib.crc32(rest) + rest + b"\n"


def read_head(line: bytes) -> Head | None:
    """What a line is, or None if it is not whole: no newline, another checksum, no record at all.

    Raises:
        CheckpointError: the line is whole and of a newer format.
    """
    found = _HEAD.fullmatch(line[:-1]) if line.endswith(b"\n") else None
    if found is None or zlib.crc32(found[2]) != int(found[1], 16):
        return None
    if int(found[3]) != VERSION:
        raise CheckpointError(
            f"the journal has records of format {int(found[3])}, written by a newer megatron_sip (this one knows "
            f"{VERSION}); upgrade, or move the folder journal out of --save to ask all judges anew"
        )
    if found[4] is None or found[4].decode() not in KINDS:
        return None
    return Head(found[4].decode(), int(found[5]), int(found[6]))


def decode(line: bytes) -> list[Entry]:
    """The answers in a line.

    Raises:
        ValueError: the line is not whole, or holds something else.
    """
    head = read_head(line)
    if head is None or head.kind not in ("verdicts", "rewrites"):
        raise ValueError("no whole record of answers")
    fields = json.loads(line)
    names, source = fields["candidates"], Source(*fields["source"])
    return [
        (
            Key(head.sample, fields["context"], source, names[first], None if second is None else names[second], vote),
            _decode_value(value),
        )
        for first, second, vote, value in fields["answers"]
    ]


def _decode_value(value: Any) -> Value:
    if not isinstance(value, dict):
        return float(value)
    if "text" in value:
        return str(value["text"])
    return Missing(MissingReason(value["missing"]), FROM_JOURNAL)
