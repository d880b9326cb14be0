"""What the persistent cache calls an answer, and how it spells one. Pure.

The journal names an answer by its sample, so that a step repeats. A name here has no sample in it: it holds over epochs
and runs, and for two samples that ask the same. It covers all that shapes an answer: service, model, version of the
prompt, reading and sampling, what of the server shapes answers (the folder of its model too), the texts that the
prompt shows, and the vote.

Of a sampled judge two answers to one question are two draws, and a score of a rollout shall rest on draws of its own.
So a sampled verdict has a name only where it is of an original, which the paper scores once: its draws are made once,
vote by vote, and hold from then on. A reading without a draw (probabilities, temperature 0) has a name for every
question, since asking it twice tells nothing new; on disk belongs what depends on the document alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from megatron_sip.services.journal_records import Source
from megatron_sip.types import Candidate, CandidateKind, Pool, Question

FORMAT = 1
DIGEST_BYTES = 20
CHECK_BYTES = 8
_OF_DOCUMENT = (CandidateKind.ORIGINAL, CandidateKind.REWRITE)


class Asker(NamedTuple):
    """Who answers, as far as it shapes the answer.

    `prompting` is what of the server shapes an answer besides the prompt's texts; None for a judge without a server,
    whose answers cost less than to look them up. `settled` tells whether the same question has one answer.
    """

    source: Source
    prompting: str | None
    settled: bool


class Name(NamedTuple):
    """The name of an answer: `digest` is `[DIGEST_BYTES]` bytes.

    `on_disk` tells whether the persistent cache keeps it; otherwise it only tells equal questions in flight. `text`
    tells whether the answer is a text; otherwise it is a verdict in [0, 1].
    """

    digest: bytes
    on_disk: bool
    text: bool = False


def rewrite_name(prefix_text: str, original_text: str, asker: Asker) -> Name | None:
    """The name of the rewrite of `original_text`, which depends on the document alone."""
    if asker.prompting is None:
        return None
    return Name(_digest(asker, 0, (_of_text(prefix_text), _of_text(original_text))), on_disk=True, text=True)


def verdict_names(pool: Pool, questions: Sequence[Question], askers: Mapping[str, Asker]) -> list[Name | None]:
    """The names of the answers to questions on the distinct candidates of `pool`; `askers` by the judge's name.

    None for an answer that is a draw of its own, or that costs nothing.
    """
    around = _of_text(pool.prefix_text), _of_text(pool.original_text)
    texts = [_of_text(candidate.text) for candidate in pool.candidates]
    names: list[Name | None] = []
    for question in questions:
        asker = askers[question.judge]
        places = [place for place in (question.first, question.second) if place is not None]
        candidates = [pool.candidates[place] for place in places]
        if asker.prompting is None or not (asker.settled or _is_original(candidates)):
            names.append(None)
            continue
        shown = _shown(question, around, [texts[place] for place in places])
        on_disk = all(candidate.kind in _OF_DOCUMENT for candidate in candidates)
        names.append(Name(_digest(asker, question.vote, shown), on_disk))
    return names


def _is_original(candidates: Sequence[Candidate]) -> bool:
    return len(candidates) == 1 and candidates[0].kind is CandidateKind.ORIGINAL


def _shown(question: Question, around: tuple[bytes, bytes], candidates: list[bytes]) -> tuple[bytes, ...]:
    """Digests of the texts that the prompt shows; all there are for a judge that is not known here."""
    prefix, original = around
    if question.judge == "safety":
        return tuple(candidates)
    if question.judge in ("quality", "likelihood"):
        return (prefix, *candidates)
    return (prefix, original, *candidates)


def _of_text(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


def _digest(asker: Asker, vote: int, texts: Sequence[bytes]) -> bytes:
    # Lengths are fixed but for the head, which JSON ends without doubt; so no two questions spell the same bytes.
    head = json.dumps([FORMAT, *asker.source, asker.prompting, vote], ensure_ascii=True).encode()
    return hashlib.blake2b(head + b"\0" + b"".join(texts), digest_size=DIGEST_BYTES).digest()


def encode(name: Name, value: float | str) -> tuple[bytes, bytes]:
    """The bytes of a value, and their checksum, which also covers the name.

    Raises:
        ValueError: the value is no verdict in [0, 1] or no text, whichever the name says.
    """
    if not _fits(name, value):
        raise ValueError(f"{value!r} is no {'text' if name.text else 'verdict in [0, 1]'}")
    spelt = json.dumps(value, ensure_ascii=True, allow_nan=False).encode()
    return spelt, _check(name, spelt)


def decode(name: Name, spelt: object, check: object) -> float | str:
    """The value that `encode` spelt.

    Raises:
        ValueError: it is damaged, or another kind of value.
    """
    if not isinstance(spelt, bytes) or check != _check(name, spelt):
        raise ValueError("the checksum does not fit")
    try:
        value = json.loads(spelt)
    except RecursionError as error:
        raise ValueError("a value of another kind") from error
    if not _fits(name, value):
        raise ValueError("a value of another kind")
    return value if isinstance(value, str) else float(value)


def _fits(name: Name, value: object) -> bool:
    if name.text:
        return isinstance(value, str)
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and 0 <= value <= 1


def _check(name: Name, spelt: bytes) -> bytes:
    return hashlib.blake2b(spelt, key=name.digest, digest_size=CHECK_BYTES).digest()
