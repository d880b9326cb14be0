"""n-grams of a sequence, of words or tokens, and how many of them are repeated."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

T = TypeVar("T", bound=Hashable)
REPEAT_GRAM = 4


def ngrams(items: Sequence[T], n: int) -> list[tuple[T, ...]]:
    """All n-grams in order. ValueError for n below 1."""
    if n < 1:
        raise ValueError("an n-gram has at least one item")
    return [tuple(items[start : start + n]) for start in range(len(items) - n + 1)]


def repeated_share(items: Sequence[Hashable], n: int = REPEAT_GRAM) -> float | None:
    """Share of the n-grams that occurred before in the same sequence; None for one of fewer than n items."""
    grams = ngrams(items, n)
    return 1 - len(set(grams)) / len(grams) if grams else None
