"""Pools of real prose for a bench: each a prefix, its true continuation and continuations from elsewhere. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_sip.errors import DataError
from megatron_sip.types import Candidate, CandidateKind, Pool


def read_texts(file: Path, key: str = "text") -> list[str]:
    """The texts of a JSONL file.

    Raises:
        DataError: it cannot be read, or a line has no such text.
    """
    try:
        texts = [json.loads(line)[key] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is no JSONL file of texts under {key!r} ({error}); name another") from error
    return [text for text in texts if isinstance(text, str)]


def prose_pools(texts: Sequence[str], count: int, candidates: int, prefix_words: int, suffix_words: int) -> list[Pool]:
    """`count` pools of `candidates` each: the true continuation, and as rollouts what other texts say there.

    Lengths are in words, so that no tokenizer is needed. Pool i begins at text i of those that are long enough; its
    rollouts come from the next ones.

    Raises:
        DataError: too few texts are long enough.
    """
    words = [text.split() for text in texts]
    usable = [found for found in words if len(found) >= prefix_words + suffix_words]
    if len(usable) < max(count, candidates):
        raise DataError(
            f"{len(usable)} texts have {prefix_words + suffix_words} words, but {count} pools of {candidates} "
            f"candidates need {max(count, candidates)}; give more text, or shorter prefixes"
        )
    return [_pool(usable, index, candidates, prefix_words, suffix_words) for index in range(count)]


def _pool(words: Sequence[Sequence[str]], index: int, candidates: int, prefix_words: int, suffix_words: int) -> Pool:
    def suffix(of: int) -> str:
        return " " + " ".join(words[of % len(words)][prefix_words : prefix_words + suffix_words])

    original = suffix(index)
    found = [Candidate(CandidateKind.ORIGINAL, (index, 0), original)]
    for number in range(1, candidates):
        found.append(Candidate(CandidateKind.ROLLOUT, (index, number), suffix(index + number), number - 1))
    return Pool(index, " ".join(words[index][:prefix_words]), original, tuple(found))


def salted(pool: Pool, salt: str) -> Pool:
    """The same pool with every text beginning with `salt`, so that a server's cache holds nothing of it yet."""
    return replace(
        pool,
        prefix_text=f"{salt} {pool.prefix_text}",
        original_text=f" {salt}{pool.original_text}",
        candidates=tuple(replace(one, text=f" {salt}{one.text}") for one in pool.candidates),
    )
