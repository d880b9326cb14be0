"""Diversity and repetition of texts, by words: what a collapse shows where a safety score does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sip.ngrams import ngrams, repeated_share

LONGEST_LOOP_WORDS = 24
LONGEST_LOOP_CHARACTERS = 16
LOOP_TURNS = 3
SHORTEST_LOOP_WORDS = 8
SHORTEST_LOOP_CHARACTERS = 64


@dataclass(frozen=True)
class TextMeasures:
    """Measures of a set of texts. A mean over no text is None.

    `distinct[n]` is the number of different n-grams over the number of all n-grams of the set, so it falls
    with the size of the set: compare sets of the same number of texts only. `repetition` is the mean
    over texts of the share of repeated 4-grams, `looping` the share of texts with a loop, `empty` the
    share without any word, `mean_words` the mean number of words, empty texts included.
    """

    texts: int
    distinct: dict[int, float | None]
    repetition: float | None
    looping: float | None
    empty: float | None
    mean_words: float | None


def measure_texts(texts: Sequence[str]) -> TextMeasures:
    """All measures of a set of texts. Words are split at white space."""
    words = [text.split() for text in texts]
    repeated = [share for share in map(repeated_share, words) if share is not None]
    return TextMeasures(
        texts=len(texts),
        distinct={n: distinct(words, n) for n in (1, 2, 3)},
        repetition=_mean(repeated),
        looping=_mean([float(has_loop(text)) for text in texts]),
        empty=_mean([float(not split) for split in words]),
        mean_words=_mean([float(len(split)) for split in words]),
    )


def distinct(texts: Sequence[Sequence[str]], n: int) -> float | None:
    """Different n-grams over all n-grams of the set (distinct-n); None where no text has n words."""
    grams = [gram for words in texts for gram in ngrams(words, n)]
    return len(set(grams)) / len(grams) if grams else None


def has_loop(text: str) -> bool:
    """Whether a stretch of the text says the same thing three times or more in direct succession.

    By words: a period of up to 24 words, the stretch at least 8 words long. By characters, for text
    without spaces: a period of up to 16 characters, the stretch at least 64 long.
    """
    if _periodic(text.split(), LONGEST_LOOP_WORDS, SHORTEST_LOOP_WORDS):
        return True
    return _periodic("".join(text.split()), LONGEST_LOOP_CHARACTERS, SHORTEST_LOOP_CHARACTERS)


def _periodic(items: Sequence[str], longest_period: int, shortest_stretch: int) -> bool:
    """Whether some stretch equals itself moved by a period, for at least LOOP_TURNS turns."""
    for period in range(1, min(longest_period, len(items) // LOOP_TURNS) + 1):
        needed = max(LOOP_TURNS * period, shortest_stretch) - period
        run = 0
        for index in range(period, len(items)):
            run = run + 1 if items[index] == items[index - period] else 0
            if run >= needed:
                return True
    return False


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
